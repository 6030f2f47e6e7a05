"""When a run has to stop, so that its checkpoint is on the disk before its time is over: --time-limit."""

from __future__ import annotations

import time
from collections import deque

from apart_hf.config.train_config import FilledConfig
from apart_hf.utils.processes import age

MARGIN = 5.0  # seconds for what is not measured: the end of an interpreter that holds torch takes 1 to 4
SAFETY = 1.5  # how much longer than measured a step, an evaluation or a checkpoint may take
PICTURES = 5.0  # seconds to draw those of the last epoch
_STEPS = 50  # latest ones, of which the longest counts


class TimeLimit:
    """Measures steps, checkpoints and ends of epochs, and tells whether there is time for what comes next.

    Args:
        seconds: from the start of this process to when all must be written.
        text: the limit as the user gave it.

    `start_up` is how old the process was when this was made: the imports of another one take about as long.
    """

    def __init__(self, seconds: float, text: str):
        self.text = text
        self.has_begun = False
        self.start_up = age()
        self._end = time.monotonic() + seconds - age()
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._first: float | None = None
        self._checkpoint: float | None = None
        self._closing: dict[bool, float] = {}  # ends of epochs, with and without an evaluation
        self._mark = time.monotonic()

    @classmethod
    def of(cls, config: FilledConfig) -> TimeLimit | None:
        """Return the limit of a run; None: it has none."""
        if config.time_limit is None or config.time_limit_seconds is None:
            return None
        return cls(config.time_limit_seconds, config.time_limit)

    @property
    def left(self) -> float:
        """Return the seconds until all must be written."""
        return self._end - time.monotonic()

    @property
    def too_short(self) -> str:
        """Say that no step can be made."""
        return f"before a training step: preparing the run has taken {age():.0f} s of it; more time is needed."

    @property
    def knows_checkpoints(self) -> bool:
        """Tell whether a checkpoint has been measured."""
        return self._checkpoint is not None

    def knows_the_end_of_an_epoch(self, *, evaluated: bool) -> bool:
        """Tell whether what follows the last step of an epoch has been measured."""
        return evaluated in self._closing

    def begin(self) -> None:
        """Note that training begins."""
        self.has_begun = True
        self.resume()

    def resume(self) -> None:
        """Note that the next step begins."""
        self._mark = time.monotonic()

    def end_step(self) -> None:
        """Note that a step has ended. The first one, in which much is compiled or allocated, stands by itself."""
        seconds = time.monotonic() - self._mark
        if self._first is None:
            self._first = seconds
        else:
            self._steps.append(seconds)

    def end_checkpoint(self, seconds: float) -> None:
        """Note how long a checkpoint took."""
        self._checkpoint = max(seconds, self._checkpoint or 0.0)

    def end_epoch(self, evaluated: bool) -> None:
        """Note that all is written which follows the last step of an epoch."""
        seconds = time.monotonic() - self._mark
        self._closing[evaluated] = max(seconds, self._closing.get(evaluated, 0.0))

    @property
    def step(self) -> float:
        """Return the seconds that the next step may take, as far as is known."""
        return max(self._steps, default=self._first or 0.0)

    def is_short_for_a_step(self) -> bool:
        """Tell whether the next step and its checkpoint would end too late."""
        return self.left < MARGIN + SAFETY * (self.step + (self._checkpoint or 0.0))

    def is_short_for_the_end_of_an_epoch(self, *, images: float | None, last: bool) -> bool:
        """Tell whether what follows the last step of an epoch, a checkpoint at its end, would end too late.

        Args:
            images: that are then evaluated, as a share of those of a step; None: there is no evaluation.
            last: whether the training ends there.
        """
        known = self._closing.get(images is not None)
        if known is None:
            # forwards alone take less than steps of as many images; the first one may be compiled
            evaluation = 0.0 if images is None else images * self.step + (self._first or 0.0)
            known = evaluation + (self._checkpoint or 0.0)
        return self.left < MARGIN + SAFETY * known + (PICTURES if last else 0.0)
