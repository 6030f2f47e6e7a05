"""What a training keeps to go on exactly, beyond what Accelerate saves: weights, optimizer and gradient scaler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class TrainerState:
    """Holds what is the same on all processes.

    Args:
        steps: optimizer steps in all.
        epoch: whole epochs.
        batch: batches of the epoch that has begun.
        scheduler: state of the learning-rate schedule; None: the rate is constant, or the schedule is to start anew.
        ema: state of the averaged network; None: there is none.
        guard: counts of `nonfinite.Guard`.
    """

    steps: int
    epoch: int
    batch: int
    scheduler: dict[str, Any] | None
    ema: dict[str, Tensor] | None
    guard: dict[str, int]


@dataclass
class ProcessState:
    """Holds what is one process's own.

    Args:
        totals: sums (3,) of the epoch's losses, hits and samples so far; None: it has not begun.
        strategy: of `strategy.state_dict()`.
        skipped: rows of images that were passed over in the epoch so far.
        random: of `random_state()`.
        figures: sums (5,) of `StepFigures` so far; None: nobody is told.
        statistics: BatchNorm's of the averaged network, where processes share the mean of theirs; None: they do not.
    """

    totals: Tensor | None
    strategy: dict[str, Any]
    skipped: list[int]
    random: dict[str, Any]
    figures: Tensor | None = None
    statistics: dict[str, Tensor] | None = None
