"""How far a training is, and what is said of it on the way."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from apart_hf.training.epoch_metrics import TrainedEpoch
from apart_hf.utils.progress_bar import is_watched, progress_bar

_log = logging.getLogger(__name__)
SECONDS = 1.0  # between two looks of a bar at the device


class Progress:
    """Counts optimizer steps in all, whole epochs, batches of the epoch that has begun, and their sums.

    Args:
        device: of the sums.

    `totals`, (3,), are sums of losses, hits and samples over this process's batches; None: between epochs. `recent` are
    the same since whoever reads them has set them to zero.
    """

    def __init__(self, device: torch.device | str):
        self.device = device
        self.steps = self.epoch = self.batch = 0
        self.totals: Tensor | None = None
        self.recent, self._of_step = torch.zeros(3, device=device), torch.zeros(3, device=device)

    def begin_epoch(self) -> Tensor:
        """Let the sums start from zero, unless the epoch has begun already. Returns them."""
        if self.totals is None:
            self.totals = torch.zeros(3, device=self.device)
        self._of_step.zero_()
        return self.totals

    def end_epoch(self) -> None:
        """Count the epoch."""
        self.epoch, self.batch, self.totals = self.epoch + 1, 0, None

    def count(self, loss: Tensor, output: Tensor, labels: Tensor) -> None:
        """Add a batch to the sums of its step.

        Args:
            loss: mean over its samples.
            output: (M, classes) logits.
            labels: (M,) class indices.
        """
        samples = len(labels)
        hits = (output.argmax(-1) == labels).sum()
        self._of_step += torch.stack([loss * samples, hits, torch.full_like(hits, samples)]).to(self._of_step)

    def end_step(self, made: bool) -> None:
        """Take the batches of a step into the sums where it was `made`, and forget them where it was left out."""
        if made and self.totals is not None:
            self.totals += self._of_step
            self.recent += self._of_step
        self._of_step.zero_()

    def reaches(self, epoch: int) -> bool:
        """Tell whether the epoch that has begun is this one, counted from 1, or one after it."""
        return self.epoch + 1 >= epoch

    def has_made(self, max_steps: int | None) -> bool:
        """Tell whether so many optimizer steps have been made; None: there is no such end."""
        return max_steps is not None and self.steps >= max_steps

    def batches_until(self, max_steps: int | None, length: int, accumulated: int) -> int:
        """Count the batches of the epoch up to its end, or to the end of the training if that is sooner.

        Args:
            max_steps: optimizer steps after which the training ends; None: there is no such end.
            length: batches of the whole epoch.
            accumulated: batches of an optimizer step, but for the last one of an epoch, which may have fewer.
        """
        if max_steps is None:
            return length
        return min(length, self.batch + max(0, max_steps - self.steps) * accumulated)

    def is_done(self, epochs: int, max_steps: int | None) -> bool:
        """Tell whether so many epochs, or steps, have been made and what is due after them; None: no such end."""
        return self.epoch >= epochs or (self.batch == 0 and self.has_made(max_steps))


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the rate of the schedule, of which groups of parameters may have shares."""
    return float(max(group["lr"] for group in optimizer.param_groups))


class EpochReport:
    """Shows an epoch by a bar, or by log lines where nobody watches one; says what was measured at its end.

    Args:
        progress: of the training; its epoch has begun.
        accelerator: its main process shows the bar.
        title: for instance "epoch 3/200".
        batches: of the epoch that are to be made in all, those before it was resumed included.
        log_interval: steps between log lines where there is no bar.
    """

    def __init__(self, progress: Progress, accelerator: Accelerator, title: str, batches: int, log_interval: int):
        self.progress, self.accelerator, self.title, self.batches = progress, accelerator, title, batches
        self.has_bar, self.interval = is_watched(), log_interval
        self.first = self._shown = progress.batch
        self._totals = progress.begin_epoch()
        self._seen_before = self._totals[2].item()
        self._start = self._shown_at = time.perf_counter()
        self._bar: Any = None

    def over(self, batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Give the batches with their numbers in the epoch, from 1, under a bar."""
        self._bar = progress_bar(batches, self.title, unit="step", initial=self.first, total=self.batches)
        try:
            yield from enumerate(self._bar, start=self.first + 1)
        finally:
            self._bar.close()

    def show(self, batch: int, lr: float) -> bool:
        """Say how it goes and the learning rate, where that is due after a batch; return whether it was."""
        since = batch - self._shown
        now = time.perf_counter()
        if since < self.interval and not (self.has_bar and now - self._shown_at >= SECONDS):
            return False
        loss_sum, correct, seen = self._totals.tolist()
        rate = (seen - self._seen_before) * self.accelerator.num_processes / (time.perf_counter() - self._start)
        seen = seen or math.nan  # every step so far was left out
        figures = f"loss {loss_sum / seen:.3f}, top-1 {100 * correct / seen:.1f} %, lr {lr:.3g}, {rate:.0f} images/s"
        self._shown, self._shown_at = batch, now
        if self.has_bar:
            self._bar.set_postfix_str(figures)
        else:
            _log.info("%s, step %d/%d: %s", self.title, batch, self.batches, figures)
        return True

    def measured(self) -> tuple[TrainedEpoch, float]:
        """Return what was measured over all processes, and the number of samples; without one the loss is NaN."""
        loss_sum, correct, seen = self.accelerator.reduce(self._totals, "sum").tolist()
        seconds = time.perf_counter() - self._start
        rate = (seen - self._seen_before * self.accelerator.num_processes) / seconds
        samples = seen or math.nan
        return TrainedEpoch(loss_sum / samples, 100 * correct / samples, rate, seconds), seen
