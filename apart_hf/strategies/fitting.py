"""The second pass of one batch: how many samples it takes, and what is done where groups or ratio do not fit them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from apart_hf.errors import ApartError
from apart_hf.strategies.perturbation import Perturbation

_log = logging.getLogger(__name__)
Changes = Sequence[dict[str, Any]]  # hyper-parameters of each perturbation that differ from its own


@dataclass(frozen=True)
class Plan:
    """What the second pass of a batch is made of.

    Args:
        samples: M, in the batch.
        size: N, in the second pass.
        attempts: changes under which it may be possible, the nearest to the strategy's own first; it is not known
            before the pass whether a layer has too few values in a group. Empty: the pass is a plain one.
    """

    samples: int
    size: int
    attempts: list[Changes]

    @property
    def weights(self) -> tuple[float, float]:
        """Return the weights M/(M+N) of the clean and N/(M+N) of the perturbed gradient (Algorithm 1, line 12)."""
        total = self.samples + self.size
        return self.samples / total, self.size / total


def whole_size(ratio: float, samples: int) -> int:
    """Compute N = ratio * M.

    Raises:
        ApartError: where it is no whole number, or nothing.
    """
    if samples < 1:
        raise ApartError("the batch has no samples; leave empty batches out.")
    size = round(ratio * samples)
    if abs(size - ratio * samples) > 1e-4 or size < 1:  # a ratio may come rounded from a command line
        raise ApartError(
            f"ratio={ratio} of a batch of {samples} is {ratio * samples:g} samples, not a whole number; "
            f"choose a ratio k/{samples}, for instance {max(size, 1)}/{samples} = {max(size, 1) / samples!r}."
        )
    return size


def fitted(ratio: float, perturbations: Sequence[Perturbation], samples: int) -> tuple[int, list[Changes]]:
    """Find the nearest smaller second pass that is possible: its size N, and changes of hyper-parameters.

    Returns:
        N, and the changes, the nearest first; none: there is no such pass.
    """
    size = int(ratio * samples + 1e-4)
    if size < 1:
        return 0, []
    return size, list(itertools.product(*(list(p.fits(size)) for p in perturbations)))


@contextmanager
def changed(perturbations: Sequence[Perturbation], changes: Changes) -> Iterator[None]:
    """Give perturbations other hyper-parameters within the block."""
    before = [{key: getattr(p, key) for key in new} for p, new in zip(perturbations, changes)]
    try:
        _assign(perturbations, changes)
        yield
    finally:
        _assign(perturbations, before)


def _assign(perturbations: Sequence[Perturbation], values: Changes) -> None:
    for perturbation, new in zip(perturbations, values):
        for key, value in new.items():
            setattr(perturbation, key, value)


class Notice:
    """Says once what was done about batches that do not fit."""

    def __init__(self) -> None:
        self.said = False

    def plain(self, samples: int, why: str) -> None:
        """Say that a batch takes an ordinary pass."""
        self._say(f"a batch of {samples} samples takes an ordinary pass: {why}")

    def fitted(self, plan: Plan, changes: Changes, own_size: float) -> None:
        """Say what was changed for a batch, if anything was."""
        new = [f"{key}={value}" for one in changes for key, value in one.items()]
        new += [f"{plan.size} samples in the second pass"] if abs(plan.size - own_size) > 1e-4 else []
        if new:
            self._say(f"a batch of {plan.samples} samples takes {' and '.join(new)}, the nearest that fits it.")

    def _say(self, text: str) -> None:
        if not self.said:
            _log.warning("%s Further batches that do not fit are treated alike, and not reported.", text)
        self.said = True
