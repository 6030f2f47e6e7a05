"""What a checkpoint holds beyond what Accelerate saves, and the form in which it is written."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from apart_hf.errors import ApartError
from apart_hf.training.epoch_metrics import EpochMetrics
from apart_hf.training.state import TrainerState

FORMAT = 2  # 1, of apart_hf 0.1.0, has no number and the same keys


@dataclass
class CheckpointState:
    """Holds what all processes of a run share.

    Args:
        trainer: how far it is, schedule, average of the weights.
        history: metrics of the epochs so far.
        best: step of the checkpoint of the best epoch so far; None: there is none.
        images: of one process, in a batch and in an optimizer step.
        settings: of `TrainConfig`.
        data: hash of the data, see `data_digest`.
        processes: of the run.
    """

    trainer: TrainerState
    history: list[EpochMetrics]
    best: int | None
    images: tuple[int, int]
    settings: dict[str, Any]
    data: str
    processes: int

    def to_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, text, lists and tables of them, which torch reads without running code."""
        return {
            "format": FORMAT,
            **vars(self.trainer),
            "history": [metrics.as_line() for metrics in self.history],
            **{key: getattr(self, key) for key in ("best", "images", "settings", "data", "processes")},
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any], source: Path) -> CheckpointState:
        """Read what `to_dict` gave, of this format or an earlier one.

        Raises:
            ApartError: where `source`, the checkpoint, is of a later format or lacks a key.
        """
        number = found.get("format", 1)
        if number > FORMAT:
            raise ApartError(
                f"{source} is of format {number}, and this apart_hf reads formats up to {FORMAT}; go on with the "
                "version that wrote it, or a later one."
            )
        try:
            trainer = TrainerState(**{one.name: found[one.name] for one in fields(TrainerState)})
            history = [EpochMetrics.from_line(line) for line in found["history"]]
            return cls(
                trainer,
                history,
                found["best"],
                tuple(found["images"]),
                found["settings"],
                found["data"],
                found["processes"],
            )
        except KeyError as error:
            raise ApartError(
                f"{source} lacks {error.args[0]!r}; remove it, so that the one before is taken."
            ) from error
