"""A model as a folder in timm's form: its two files, what they record, and whether they are intact."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apart_hf.errors import ApartError
from apart_hf.hub.training_record import Claim, DataRecord, TrainingRecord
from apart_hf.utils.files import sha256

WEIGHTS, CONFIG = "model.safetensors", "config.json"
CLASS_MAP = "class_map.txt"  # class names by index, one a line, as timm's --class-map takes them


def update_record(folder: Path, **entries: Any) -> None:
    """Add to the "apart" block of an exported folder, by one step for readers."""
    config = json.loads((folder / CONFIG).read_text())
    config["apart"] |= entries
    temporary = folder / f".{CONFIG}"
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    temporary.replace(folder / CONFIG)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a folder in timm's form; its "apart" block, if any, is a dict.

    Raises:
        ApartError: where it is not there or not of that form.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        config["architecture"], config["num_classes"], config["pretrained_cfg"]["input_size"]
        if not isinstance(config.setdefault("apart", {}), dict):
            raise TypeError("its apart block is no table")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ApartError(
            f"{folder} is no exported model: its {CONFIG} cannot be read ({type(error).__name__}: {error}); name the "
            "folder of a run, or one that timm saved."
        ) from error
    return config


def check_intact(folder: Path) -> None:
    """Raise ApartError where the weights are missing, or not those whose sha256 was recorded; without one they pass."""
    recorded = read_config(folder)["apart"].get("sha256")
    if not (folder / WEIGHTS).is_file():
        raise ApartError(f"{folder} has no {WEIGHTS}; pickled weights are not taken, save them by safetensors.")
    if recorded is not None and sha256(folder / WEIGHTS) != recorded:
        raise ApartError(
            f"{folder / WEIGHTS} is damaged: its sha256 is not {recorded[:12]}..., as recorded; export it again."
        )


@dataclass(frozen=True)
class Exported:
    """Holds what a run, or a folder in timm's form, says of its model.

    Args:
        config: of config.json.
        training: its "apart" block; empty for a model that was not trained here.
        history: lines of metrics.jsonl; empty where there is none.
        has_plot: there is plots/training.png.
    """

    config: dict[str, Any]
    training: TrainingRecord
    history: list[dict[str, float]]
    has_plot: bool

    @classmethod
    def read(cls, folder: Path) -> Exported:
        """Read what a run, or a folder in timm's form, says of its model.

        Raises:
            ApartError: where it is neither.
        """
        config, metrics = read_config(weights_folder(folder)), folder / "metrics.jsonl"
        try:
            training = TrainingRecord.from_dict(config["apart"])
        except TypeError as error:
            raise ApartError(f'{folder}: the block "apart" of its {CONFIG} cannot be read ({error}).') from error
        try:
            history = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        except ValueError as error:
            raise ApartError(f"{metrics} cannot be read ({error}); remove its last line, or the file.") from error
        return cls(config, training, history, (folder / "plots" / "training.png").exists())

    @property
    def data(self) -> DataRecord:
        """Return what the record says of the data; nothing, where it does not say."""
        return self.training.data or DataRecord()

    @property
    def results(self) -> Claim | None:
        """Return what is claimed of these weights, where metrics are beside them."""
        return self.training.results if self.history else None


def weights_folder(folder: Path) -> Path:
    """Return the folder of the weights: of a run those of the last epoch, else the folder itself."""
    return folder / "last" if (folder / "last").is_dir() else folder


def model_cards_folder() -> Path:
    """Return where the template and the released models are: in an installed package, or in a checkout."""
    inside = Path(__file__).parents[1] / "model_cards"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "model_cards"
