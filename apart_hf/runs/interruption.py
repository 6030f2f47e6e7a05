"""Signals, and a limit of time, that stop a run: it finishes its step and writes a checkpoint.

A second signal stops it at once.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from apart_hf.errors import ApartError
from apart_hf.runs.time_limit import MARGIN, TimeLimit
from apart_hf.utils.processes import SIGNALS, anywhere, from_main_process

if TYPE_CHECKING:
    from apart_hf.runs.run import Run


EXIT_CODE = 75  # EX_TEMPFAIL: run the same command again, with --resume auto


class Interrupted(Exception):
    """Tells that the run was asked to stop and can be resumed."""


class ProcessLost(Interrupted):
    """Tells that another process, of the run or of a loader, has ended or does not answer; only this one may know."""


# of RuntimeErrors from gloo; NCCL and the store raise torch's DistError
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "Timed out waiting")


@contextlib.contextmanager
def noticing_lost_processes() -> Iterator[None]:
    """Raise ProcessLost where an exchange within the block fails because a process is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = next((sign for sign in _LOST if "gloo" in str(error) and sign in str(error)), type(error).__name__)
        if not isinstance(error, dist.DistError) and reason not in _LOST:
            raise
        raise ProcessLost(
            f"another process of this run has ended or does not answer ({reason}); look for its own message. The last "
            "checkpoint, where there is one, is intact."
        ) from error


class StopRequest:
    """Knows whether any process of the run was asked to stop, or has no time for more.

    Args:
        accelerator: of the run; None: there is none yet.
        limit: of the run's time; None: there is none.
    """

    def __init__(self, accelerator: Accelerator | None = None, limit: TimeLimit | None = None):
        self.accelerator, self.name, self.patient, self.at_once = accelerator, "", False, False
        self.limit, self.time_is_over, self.nothing_to_lose = limit, False, False

    def __bool__(self) -> bool:
        """Tell whether to stop, asked of all processes at the same step, so that they stop together."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return bool(self.name) or self.time_is_over
        asked = torch.tensor([int(bool(self.name)), int(self.time_is_over)], device=self.accelerator.device)
        signals, limits = self.accelerator.reduce(asked, "sum").tolist()
        self.time_is_over = limits > 0 and not signals
        return signals + limits > 0

    @property
    def cause(self) -> str:
        """Say what the run was stopped by."""
        if self.name or self.limit is None or not self.time_is_over:
            return self.name or "a signal to another process"
        return f"--time-limit {self.limit.text}"

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first signal within the block, and leave the second one its usual effect.

        Raises:
            Interrupted: at once where nobody waits for the end of a step, see `noting`; also where the time is over.
        """

        def note(number: int, frame: FrameType | None) -> None:
            self.name = signal.Signals(number).name
            for one, usual in ((one, usual) for one, usual in before.items() if one in SIGNALS):
                signal.signal(one, signal.SIG_DFL if one is not signal.SIGINT else usual)
            if not self.patient:
                self.at_once = True
                raise KeyboardInterrupt  # which libraries let through

        def alarm(number: int, frame: FrameType | None) -> None:
            if not self.patient or self.nothing_to_lose:
                self.time_is_over = self.at_once = True
                raise KeyboardInterrupt

        try:
            before = {number: signal.signal(number, note) for number in SIGNALS}
            if self.limit is not None:
                before[signal.SIGALRM] = signal.signal(signal.SIGALRM, alarm)
                signal.setitimer(signal.ITIMER_REAL, max(0.001, self.limit.left - MARGIN))
        except ValueError:  # not in the main thread: signals are somebody else's
            yield
            return
        try:
            yield
        except KeyboardInterrupt:
            if not self.at_once:
                raise
            early = self.limit is not None and self.time_is_over and not self.limit.has_begun
            where = self.limit.too_short if early and self.limit else "between training steps."
            raise Interrupted(f"stopped by {self.cause} {where}") from None
        finally:
            if self.limit is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Let a signal within the block only be noted: the run asks at the end of each step."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False


class Schedule:
    """Does what is due after each optimizer step: a checkpoint where one is due, or where the run is to stop.

    Args:
        interval: (steps, seconds) between checkpoints; None: not by that.
        run: which saves.
    """

    def __init__(self, interval: tuple[int | None, float | None], run: Run):
        self.steps, self.seconds = interval
        self.run, self.stop, self.progress = run, run.stop, run.trainer.progress
        self.limit = run.stop.limit
        self.last = time.monotonic()

    def begin(self) -> None:
        """Look, before the first step, whether there is time for one.

        Raises:
            Interrupted: where there is none.
        """
        if self.limit is None:
            return
        self.limit.begin()
        self.stop.time_is_over = self.limit.is_short_for_a_step()
        if self.stop:
            raise Interrupted(f"stopped by {self.stop.cause} {self.limit.too_short}")

    def __call__(self) -> None:
        """Save where that is due.

        Raises:
            Interrupted: after the checkpoint of a run that is to stop.
        """
        needs_one = self._measure_step()
        stopping = bool(self.stop)
        if stopping or self._due() or needs_one:
            began = time.monotonic()
            self.run.save()
            self.last = time.monotonic()
            if self.limit is not None:
                self.limit.end_checkpoint(self.last - began)
        if stopping:
            raise self._interrupted()
        if self.limit is not None:
            self.stop.nothing_to_lose = needs_one and self.run.epoch_ends() is not None
            self.limit.resume()

    def _measure_step(self) -> bool:
        """Ask the limit, where there is one, whether there is time for what follows.

        Returns:
            Whether a checkpoint is needed: to measure what one takes, or since nobody knows yet what the end of an
            epoch takes. That then is begun, and broken off where the time is over.
        """
        if self.limit is None:
            return False
        self.limit.end_step()
        ending, short = self.run.epoch_ends(), self.limit.is_short_for_a_step()
        needs_one = not self.limit.knows_checkpoints
        if ending is not None:
            images, last = ending
            ends_late = self.limit.is_short_for_the_end_of_an_epoch(images=images, last=last)
            if self.limit.knows_the_end_of_an_epoch(evaluated=images is not None):
                short = ends_late
            else:
                needs_one = needs_one or ends_late
        self.stop.time_is_over = short
        return anywhere(self.run.accelerator, needs_one)  # their clocks differ, and all save together

    def check(self, *, evaluated: bool, done: bool) -> None:
        """Look, after an epoch whose checkpoint has been written, whether the run is to stop.

        Args:
            evaluated: whether the epoch was evaluated.
            done: whether nothing is left to train; the time that is left then does not stop the run.

        Raises:
            Interrupted: where it is to stop.
        """
        self.last = time.monotonic()
        self.stop.nothing_to_lose = False
        if self.limit is not None:
            self.limit.end_epoch(evaluated)
            self.stop.time_is_over = not done and self.limit.is_short_for_a_step()
            self.limit.resume()
        if self.stop:
            raise self._interrupted()

    def _due(self) -> bool:
        if self.steps is not None:
            return self.progress.steps % self.steps == 0
        if self.seconds is None:
            return False
        due = time.monotonic() - self.last >= self.seconds
        return broadcast_object_list([due])[0]  # the clock of one process counts

    def _interrupted(self) -> Exception:
        kept, _ = from_main_process(self.run.accelerator, self.run.checkpoints.newest)
        steps = self.progress.steps
        if kept is None:
            return ApartError(f"stopped by {self.stop.cause} after step {steps}, and no checkpoint could be written.")
        return Interrupted(f"stopped by {self.stop.cause} after step {steps}; the last checkpoint is {kept}.")
