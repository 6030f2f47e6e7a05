"""What datasets share whose loader processes live longer than one epoch."""

from __future__ import annotations

import torch


class OfEpoch:
    """The epoch's number, in memory that loader processes, if any, share; subclasses count images passed over in it.

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
        """Called by Accelerate's loader: another epoch draws otherwise."""
        self._epoch.fill_(epoch)

    def skipped_rows(self) -> list[int]:
        """What a checkpoint within an epoch keeps of the count: nothing, where going on reads it from its start."""
        return []

    def mark_skipped(self, rows: list[int]) -> None:
        """The reverse of `skipped_rows`."""

    def take_skipped(self) -> int:
        """Images passed over since the last call."""
        raise NotImplementedError
