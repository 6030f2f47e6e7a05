"""What datasets share whose loader processes live longer than one epoch."""

from __future__ import annotations

import torch
from torch.utils.data import get_worker_info


class OfEpoch:
    """The epoch's number, and the count of images passed over in it: memory that loader processes, if any, share.

    Args:
        workers: loader processes.
    """

    def __init__(self, workers: int = 0):
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._skipped = torch.zeros(workers + 1, dtype=torch.int64)  # one writer each
        if workers:
            self._epoch.share_memory_()
            self._skipped.share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Called by Accelerate's loader: another epoch draws otherwise."""
        self._epoch.fill_(epoch)

    def skip(self) -> None:
        """Count one image that is passed over."""
        worker = get_worker_info()
        self._skipped[0 if worker is None else worker.id + 1] += 1

    def skipped_rows(self) -> list[int]:
        """What a checkpoint within an epoch keeps of the count: nothing, where going on reads it from its start."""
        return []

    def mark_skipped(self, rows: list[int]) -> None:
        """The reverse of `skipped_rows`."""

    def take_skipped(self) -> int:
        """Images passed over since the last call."""
        count = int(self._skipped.sum())
        self._skipped.zero_()
        return count
