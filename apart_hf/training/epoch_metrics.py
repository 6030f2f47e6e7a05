"""What is measured of one epoch, and its line in metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass, field

from apart_hf.training.predictions import Predictions


@dataclass(frozen=True)
class Evaluation:
    """Holds what is measured of a network on a split.

    Args:
        eval_loss: mean cross-entropy.
        top1, top5: accuracy in per cent.
        eval_skipped: images that could not be decoded and were left out; None: such are an error.
        predictions: that it is of; None: they were not kept.
    """

    eval_loss: float
    top1: float
    top5: float
    eval_skipped: int | None = None
    predictions: Predictions | None = field(default=None, repr=False, compare=False)

    def as_line(self) -> dict[str, float]:
        """Return the numbers by name, without what was not counted."""
        line = {"eval_loss": self.eval_loss, "top1": self.top1, "top5": self.top5}
        return line if self.eval_skipped is None else line | {"eval_skipped": self.eval_skipped}


@dataclass(frozen=True)
class TrainedEpoch:
    """Holds what is measured while an epoch is trained; means are over all samples of all processes.

    Args:
        train_loss, train_top1: mean loss and accuracy (per cent) of the clean passes.
        images_per_second, seconds: of the epoch, without its evaluation.
    """

    train_loss: float
    train_top1: float
    images_per_second: float
    seconds: float


@dataclass(frozen=True)
class EpochMetrics:
    """Holds one line of metrics.jsonl.

    Args:
        epoch: its number, from 1.
        trained: what was measured in training.
        evaluation: after it; None: it was not evaluated.
        lr: learning rate of its last step.
        train_skipped: images that could not be decoded and were passed over; None: such are an error.
        skipped_steps: steps left out since they were not finite; None: such end the run.
    """

    epoch: int
    trained: TrainedEpoch
    evaluation: Evaluation | None
    lr: float
    train_skipped: int | None = None
    skipped_steps: int | None = None

    def as_line(self) -> dict[str, float]:
        """Return the values by name; what was not measured is left out."""
        line = {"epoch": self.epoch, **vars(self.trained)}
        line |= {} if self.evaluation is None else self.evaluation.as_line()
        counts = {"lr": self.lr, "train_skipped": self.train_skipped, "skipped_steps": self.skipped_steps}
        return line | {key: value for key, value in counts.items() if value is not None}

    @classmethod
    def from_line(cls, line: dict[str, float]) -> EpochMetrics:
        """Read what `as_line` returned."""
        evaluation = None
        if "top1" in line:
            evaluation = Evaluation(line["eval_loss"], line["top1"], line["top5"], _count(line, "eval_skipped"))
        trained = TrainedEpoch(line["train_loss"], line["train_top1"], line["images_per_second"], line["seconds"])
        return cls(
            int(line["epoch"]),
            trained,
            evaluation,
            line["lr"],
            _count(line, "train_skipped"),
            _count(line, "skipped_steps"),
        )


def _count(line: dict[str, float], key: str) -> int | None:
    return int(line[key]) if key in line else None
