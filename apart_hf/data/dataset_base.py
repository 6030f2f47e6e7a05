"""What the kinds of dataset share: the number of the epoch, and random numbers that depend on it alone."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


class EpochDataset:
    """Holds the epoch's number in memory that loader processes share; subclasses count the images passed over in it.

    Args:
        workers: loader processes.
    """

    def __init__(self, workers: int = 0):
        self._epoch = torch.zeros((), dtype=torch.int64)
        if workers:
            self._epoch.share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, as Accelerate's loader does: another one draws otherwise."""
        self._epoch.fill_(epoch)

    def skipped_rows(self) -> list[int]:
        """Return what a checkpoint within an epoch keeps of the count; nothing, where the epoch is read again."""
        return []

    def mark_skipped(self, rows: list[int]) -> None:
        """Take in what `skipped_rows` returned."""

    def take_skipped(self) -> int:
        """Count the images passed over since the last call."""
        raise NotImplementedError

    def warning(self) -> str | None:
        """Return what should be said of the images that were given so far; None: nothing."""
        return None


@contextlib.contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Start the global generators of torch (CPU), numpy and Python from `entropy`, for the length of the block.

    timm's and torchvision's transforms draw from all three.
    """
    seeds = np.random.SeedSequence(entropy).generate_state(4)
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(int(seeds[0]) << 32 | int(seeds[1]))
    np.random.seed(seeds[2])
    random.seed(int(seeds[3]))
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])
