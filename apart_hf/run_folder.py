"""What a run leaves: OUTPUT/EXPERIMENT/ with config.yaml, metrics.jsonl, best/, last/, plots/ and test.json."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from safetensors.torch import load_file
from torch import nn

from apart_hf.config import TrainConfig
from apart_hf.config_file import write_config
from apart_hf.data import ImageData
from apart_hf.errors import ApartError
from apart_hf.export import export_folder, update_record
from apart_hf.plots import plot_training
from apart_hf.trainer import Trainer


class RunFolder:
    """Makes the folder, then records one epoch at a time there and in the trackers.

    Args:
        config: resolved; its hyper-parameters are completed by `hyper`.
        images: timm's description of the evaluation images.
        data: names the classes.
        hyper: the strategy's hyper-parameters.
        record: what the exported folders say of the training, see `training_record`.
        accelerator: only its main process writes.

    Raises: ApartError where the folder exists or cannot be made; then nothing was written.
    """

    def __init__(
        self, config: TrainConfig, images: dict[str, Any], data: ImageData, hyper: dict[str, Any],
        record: dict[str, Any], accelerator: Accelerator,
    ):
        self.images, self.data, self.record, self.accelerator = images, data, record, accelerator
        self.history: list[dict[str, float]] = []
        self.folder = _make_folder(config, accelerator)
        self.config = config = dataclasses.replace(config, experiment=self.folder.name, **hyper)
        settings = dataclasses.asdict(config)
        if config.report_to:
            accelerator.project_configuration.logging_dir = str(self.folder)
            scalars = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in settings.items()}
            accelerator.init_trackers("trackers", config=scalars)
        if accelerator.is_main_process:
            (self.folder / "config.yaml").write_text(write_config(settings))
            (self.folder / "plots").mkdir()

    def add(self, metrics: dict[str, float], model: nn.Module) -> None:
        """Record one epoch: a line of metrics, the weights as last/ and, where top-1 is highest so far, as best/."""
        self.history.append(metrics)
        self.accelerator.log({k: v for k, v in metrics.items() if k != "epoch"}, step=metrics["epoch"])
        self.accelerator.print(
            f"epoch {metrics['epoch']}: train loss {metrics['train_loss']:.3f}, top-1 {metrics['train_top1']:.1f} % | "
            f"eval loss {metrics['eval_loss']:.3f}, top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} % | "
            f"{metrics['images_per_second']:.0f} images/s, {metrics['seconds']:.1f} s, lr {metrics['lr']:g}", flush=True
        )
        if metrics.get("train_skipped") or metrics.get("eval_skipped"):
            self.accelerator.print(
                f"epoch {metrics['epoch']}: images that cannot be decoded: {metrics['train_skipped']} passed over in "
                f"training, {metrics['eval_skipped']} left out of the evaluation", flush=True
            )
        if not self.accelerator.is_main_process:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        is_best = self._best() is metrics
        for name in ("last", "best") if is_best else ("last",):
            export_folder(
                plain, self.folder / name, data_config=self.images, label_names=self.data.class_names,
                tag=f"{self.config.method}_{self.config.dataset_name}".replace("/", "_").replace(".", "_"),
                apart=self.record | {"results": self._results(metrics)}, license=self.config.license,
            )
        title = f"{self.config.model}, {self.config.method}, {self.config.dataset_name}"
        plot_training(self.history, self.folder / "plots" / "training.png", title)

    def test(self, trainer: Trainer, loader: Any) -> dict[str, float]:
        """Evaluate last/ and best/ on the test split, once, and write `test.json`. Returns the result of last/."""
        results = {"split": self.data.test.name}
        results["last"] = {"epoch": self.history[-1]["epoch"], **trainer.evaluate(loader)}
        network = self.accelerator.unwrap_model(trainer.evaluated, keep_torch_compile=False)
        if self.accelerator.is_main_process:
            network.load_state_dict(load_file(self.folder / "best" / "model.safetensors"))
        for tensor in network.state_dict().values():  # other machines need not see the folder
            tensor.copy_(broadcast(tensor, from_process=0))
        results["best"] = {"epoch": self._best()["epoch"], **trainer.evaluate(loader)}
        for name in ("last", "best"):
            found = results[name]
            self.accelerator.print(
                f"test: split {self.data.test.name!r}, {name} (epoch {found['epoch']}): loss {found['eval_loss']:.3f}, "
                f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %"
            )
        if self.accelerator.is_main_process:
            (self.folder / "test.json").write_text(json.dumps(results, indent=2) + "\n")
            for name in ("last", "best"):
                update_record(self.folder / name, results={"split": self.data.test.name, **results[name]})
        return results["last"]

    def _results(self, metrics: dict[str, float]) -> dict[str, Any]:
        """What is claimed of weights: the evaluation after their epoch."""
        part = "" if self.config.val_fraction is None else f" ({self.config.val_fraction:g} of it, for validation)"
        found = {key: metrics[key] for key in ("epoch", "top1", "top5", "eval_loss")}
        return {"split": self.data.val.name + part, **found}

    def _best(self) -> dict[str, float]:
        """The metrics of the best epoch, the later of equals."""
        metric, sign = self.config.eval_metric, -1 if self.config.eval_metric == "eval_loss" else 1
        return max(reversed(self.history), key=lambda line: sign * line[metric])

    def discard_if_empty(self) -> None:
        """Remove the folder of a run that was refused before its first epoch ended."""
        if self.accelerator.is_main_process and not self.history:
            shutil.rmtree(self.folder)


def _make_folder(config: TrainConfig, accelerator: Accelerator) -> Path:
    name, problem = config.experiment or _free_name(config), ""
    if accelerator.is_main_process:
        folder = Path(config.output) / name
        try:
            folder.mkdir(parents=True, exist_ok=False)
        except FileExistsError:
            problem = f"{folder} exists already; choose another --experiment or --output."
        except OSError as error:
            problem = f"cannot write {folder}: {error.strerror}; choose another --output."
    name, problem = broadcast_object_list([name, problem])
    if problem:
        raise ApartError(problem)
    return Path(config.output) / name


def _free_name(config: TrainConfig) -> str:
    """DATASET-MODEL-METHOD, numbered where such a run is there already."""
    name = "-".join(part.replace("/", "_") for part in (config.dataset_name, config.model, config.method))
    taken, number = name, 1
    while (Path(config.output) / taken).exists():
        number += 1
        taken = f"{name}-{number}"
    return taken
