"""What a run leaves in OUTPUT/EXPERIMENT/: settings, metrics, best/, last/, plots/, test.json."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from pathlib import Path
from typing import IO, Any

from torch import nn

from apart_hf.config.train_config import CompleteConfig
from apart_hf.config.yaml_file import write_config
from apart_hf.data import Split
from apart_hf.hub.export import copy_folder, export_folder, write_class_map
from apart_hf.hub.model_folder import CLASS_MAP, update_record
from apart_hf.hub.training_record import Claim, TrainingRecord
from apart_hf.runs.closer_look import forget
from apart_hf.runs.history import History
from apart_hf.runs.report import plot_training
from apart_hf.training.epoch_metrics import EpochMetrics, Evaluation
from apart_hf.utils.files import write_whole, writing

PLOT_SECONDS = 10  # drawing takes half a second or more, which is much of a short epoch


class RunFolder:
    """Writes the files of a run but for its checkpoints. One process, the main one, writes them.

    Args:
        path: the folder; it is there.
        config: complete.
        images: timm's description of the evaluation images.
        class_names: by class index.
        record: what the exported folders say of the training.
        split: that is evaluated.

    Its methods raise ApartError where a file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        config: CompleteConfig,
        images: dict[str, Any],
        class_names: list[str],
        record: TrainingRecord,
        split: Split,
    ):
        self.path, self.config, self.images, self.class_names = path, config, images, class_names
        self.record, self.split = record, split
        self.lock: IO[str] | None = None  # open as long as this run works here
        self._plotted = time.monotonic()

    def begin(self) -> None:
        """Write the settings; what an earlier attempt without a checkpoint has left goes."""
        with writing(self.path):
            for name in ("metrics.jsonl", "test.json"):
                (self.path / name).unlink(missing_ok=True)
            forget(self.path)
            self._write_settings()
            write_class_map(self.path / "checkpoints" / CLASS_MAP, self.class_names)  # for a run that is resumed
            (self.path / "plots").mkdir(exist_ok=True)

    def go_on(self, history: History, done: bool) -> bool:
        """Bring the files to where a checkpoint is, which may be `done` with training.

        Returns:
            Whether the test split has been looked at.
        """
        with writing(self.path):
            (self.path / "plots").mkdir(exist_ok=True)
            lines = "".join(json.dumps(metrics.as_line()) + "\n" for metrics in history.epochs)
            write_whole(self.path / "metrics.jsonl", lines)  # without what was recorded later
            self._write_settings()
            if not done:
                (self.path / "test.json").unlink(missing_ok=True)
                forget(self.path)
            return (self.path / "test.json").exists()

    def _write_settings(self) -> None:
        write_whole(self.path / "config.yaml", write_config(dataclasses.asdict(self.config)))

    def add(self, history: History, network: nn.Module, *, last: bool) -> None:
        """Record the latest epoch: a line of metrics; where it was evaluated, the weights as last/ and, if best, best/.

        The curves are drawn after the last epoch, and before that every `PLOT_SECONDS` at most.

        Args:
            history: of the run, with that epoch.
            network: unwrapped.
            last: whether it is the last epoch.
        """
        metrics = history.latest
        with writing(self.path):
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(metrics.as_line()) + "\n")
            if metrics.evaluation is not None:
                self._export(metrics, metrics.evaluation, network)
                if history.best() is metrics:
                    copy_folder(self.path / "last", self.path / "best")
            if last or (metrics.evaluation is not None and time.monotonic() - self._plotted > PLOT_SECONDS):
                self._plot(history)

    def split_name(self, split: Split) -> str:
        """Name a split that is evaluated, in words where it is a part of another."""
        is_part = split is self.split and self.config.val_fraction is not None
        return split.name + (f" ({self.config.val_fraction:g} of it, for validation)" if is_part else "")

    def _export(self, metrics: EpochMetrics, evaluation: Evaluation, network: nn.Module) -> None:
        config = self.config
        claim = claim_of(evaluation, metrics.epoch, self.split, self.split_name(self.split))
        export_folder(
            network,
            self.path / "last",
            data_config=self.images,
            label_names=self.class_names,
            tag=f"{config.method}_{config.dataset_name}".replace("/", "_").replace(".", "_"),
            apart=dataclasses.replace(self.record, results=claim).to_dict(),
            license=config.license,
        )

    def _plot(self, history: History) -> None:
        title = f"{self.config.model}, {self.config.method}, {self.config.dataset_name}"
        plot_training(history, self.path / "plots" / "training.png", title)
        gc.collect()  # a figure is a cycle of references, of 3 MB
        self._plotted = time.monotonic()

    def record_test(self, split: Split, found: dict[str, tuple[int, Evaluation]]) -> None:
        """Write `test.json`, and in last/ and best/ what is claimed of them.

        Args:
            split: the test split.
            found: of "last" and "best", the epoch after which the weights were, and their evaluation.
        """
        with writing(self.path):
            for name, (epoch, evaluation) in found.items():
                claim = claim_of(evaluation, epoch, split, split.name)
                update_record(self.path / name, results=claim.to_dict())
            lines = {name: {"epoch": epoch, **evaluation.as_line()} for name, (epoch, evaluation) in found.items()}
            # last: it says that all is done
            write_whole(self.path / "test.json", json.dumps({"split": split.name, **lines}, indent=2) + "\n")


def claim_of(evaluation: Evaluation, epoch: int, split: Split, name: str) -> Claim:
    """Say what an evaluation claims of weights.

    Args:
        evaluation: of them.
        epoch: after which they were.
        split: that was evaluated.
        name: what it is called.
    """
    skipped = evaluation.eval_skipped or 0
    images = None if split.size is None else len(split) - skipped
    return Claim(name, epoch, evaluation.top1, evaluation.top5, evaluation.eval_loss, images, skipped)
