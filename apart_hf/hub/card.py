"""The model card of an exported folder, from what the folder records and the template in model_cards/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from apart_hf.errors import ApartError
from apart_hf.hub.by_class import PICTURE, shown_by_class
from apart_hf.hub.model_folder import CLASS_MAP, Exported, model_cards_folder, weights_folder
from apart_hf.hub.training_record import Claim, TrainingRecord
from apart_hf.models import is_registered_here
from apart_hf.strategies.methods import METHODS

_OURS = ("model-index", "base_model", "datasets", "metrics")  # where we say none there is none
FIRST, LAST = "<!-- apart_hf: from here -->", "<!-- apart_hf: to here -->"


def make_card(folder: Path, repo_id: str, *, previous: str | None = None) -> ModelCard:
    """Make the card of a run or of a folder in timm's form.

    Args:
        folder: metrics.jsonl and plots/ in it are used where they are.
        repo_id: the name it gets on the Hub, user/name.
        previous: the text of an earlier card; what was not written by us is kept.

    Raises:
        ApartError: where the folder cannot be read.
    """
    model = Exported.read(folder)
    training, method = model.training, model.training.method or ""
    channels, height, width = model.config["pretrained_cfg"]["input_size"]
    data_record, data_name = model.data, model.data.name
    card = ModelCard.from_template(
        _card_data(model, repo_id),
        template_path=str(model_cards_folder() / "card.md"),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        summary=_summary(model),
        results=model.results,
        validate=_validate(model),
        method=method,
        data_name=data_name,
        every=training.settings.get("every", 1),
        ratio=training.hyper.get("ratio", 1.0),
        comparison=[training.compared_with, _row(model, model.results)]
        if model.results and training.compared_with
        else None,
        is_ours=is_registered_here(model.config["architecture"]),
        architecture=model.config["architecture"],
        mode="L" if channels == 1 else "RGB",
        width=width,
        height=height,
        has_names=bool(model.config.get("label_names")),
        has_class_map=(weights_folder(folder) / CLASS_MAP).is_file(),
        timm_reader=data_record.timm_reader,
        has_plot=model.has_plot,
        by_class=shown_by_class(folder, model.results),
        has_confusion=(folder / PICTURE).is_file(),
        settings=_settings(training),
        classes=model.config["num_classes"],
        versions=", ".join(f"{name} {number}" for name, number in training.versions.items()),
        method_summary=METHODS[method].summary if method in METHODS else method,
    )
    return card if previous is None else _merged(card, previous)


def _validate(model: Exported) -> str | None:
    """Write the arguments that measure the claim again; None: its images are a part that no name stands for."""
    data, results = model.data, model.results
    if not results or " " in results.split:
        return None
    source = data.name or data.hub_id
    return (f"--dataset {source}" if source else "--data-dir FOLDER") + f" --val-split {results.split}"


def _card_data(model: Exported, repo_id: str) -> ModelCardData:
    training, data, results = model.training, model.data, model.results
    base = training.base_model
    measured: dict[str, Any] = {
        "task_type": "image-classification",
        "dataset_type": data.hub_id if data.whole else "imagefolder",  # a part is another dataset
        "dataset_name": training.dataset,
        "dataset_config": data.config,
        "metric_type": "accuracy",
    }
    return ModelCardData(
        license=model.config["pretrained_cfg"].get("license"),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=[tag for tag in ("image-classification", "timm", "apart_hf", training.method) if tag],
        datasets=[data.hub_id] if data.hub_id else None,
        base_model=base if base and "/" in base else None,
        metrics=["accuracy"] if results else None,
        model_name=repo_id.split("/")[-1],
        eval_results=[
            EvalResult(
                metric_name=f"top-{k} accuracy (%)",
                metric_value=getattr(results, f"top{k}"),
                dataset_split=results.split,
                **measured,
            )
            for k in (1, 5)
        ]
        if results
        else None,
    )


def _summary(model: Exported) -> str:
    training, (channels, *size) = model.training, model.config["pretrained_cfg"]["input_size"]
    shown = f"{'grey ' if channels == 1 else ''}images of {'x'.join(map(str, size))} pixels"
    text = f"This is `{model.config['architecture']}` for {shown} in {model.config['num_classes']} classes"
    if training.method is None:
        return text + "."
    images = f" on {model.data.images:,} images of {training.dataset}" if training.data else ""
    if model.data.hub_id and not model.data.whole:
        images += f" (a part of {model.data.hub_id})"
    start = f", starting from `{training.base_model}`" if training.base_model else ""
    return f"{text}, trained{images} by the method `{training.method}` of apart_hf{start}."


def _settings(training: TrainingRecord) -> dict[str, str]:
    """List every setting that is in use, as text."""
    if training.method is None:
        return {}
    hyper = METHODS[training.method].hyper_parameters() if training.method in METHODS else ()
    found = {"method": training.method, **{key: training.hyper.get(key) for key in hyper}, **training.settings}
    found |= {"seed": training.seed, "recipe": training.recipe, "commit": training.commit}
    return {
        key.replace("_", " "): ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in found.items()
        if value is not None and value is not False and value != []
    }


def comparison(folder: Path, other_folder: Path) -> dict[str, Any]:
    """Make what the record of `folder` keeps of another run of the same network and data.

    Raises:
        ApartError: where a folder cannot be read, or the two cannot be compared.
    """
    model, other = Exported.read(folder), Exported.read(other_folder)
    if not (model.results and other.results):
        raise ApartError("a comparison needs metrics beside both models; name the folders of runs.")
    for what, one, two in (
        ("networks", model.config["architecture"], other.config["architecture"]),
        ("datasets", model.training.dataset, other.training.dataset),
        ("splits", model.results.split, other.results.split),
        ("numbers of images", model.results.images, other.results.images),
    ):
        if one != two:
            raise ApartError(f"the runs to compare are of the {what} {one!r} and {two!r}; name two of the same.")
    return _row(other, other.results)


def _row(model: Exported, results: Claim) -> dict[str, Any]:
    return {
        "method": model.training.method,
        "passes": model.training.passes,
        "epochs": results.epoch,
        "top1": results.top1,
    }


def _merged(card: ModelCard, previous: str) -> ModelCard:
    """Add the hand-written parts of an earlier card: its text outside our marks, and further metadata."""
    try:
        old = ModelCard(previous, ignore_metadata_errors=True)
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ApartError(f"the card that is there cannot be read ({reason}); correct or remove it.") from error
    before, after = "", f"\n\n{old.text.strip()}\n" if old.text.strip() else "\n"
    if -1 < old.text.find(FIRST) < old.text.find(LAST):
        before, rest = old.text.split(FIRST, 1)
        after = rest.split(LAST, 1)[1]
    ours, theirs = card.data.to_dict(), old.data.to_dict()
    for key, value in theirs.items():
        if key == "tags" and isinstance(value, list):
            kept = [item for item in value if item not in METHODS]  # the method may be another now
            setattr(card.data, key, list(dict.fromkeys([*(ours.get(key) or []), *kept])))
        elif key not in ours and key not in _OURS:
            setattr(card.data, key, value)
    card.text = before.lstrip("\n") + card.text.strip() + after
    return card
