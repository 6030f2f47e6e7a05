"""Channels-innermost batches in rows of several pixels: arithmetic with a vector of few channels goes at full speed."""

from __future__ import annotations

from torch import Tensor

WIDTH = 512  # values of a row, where pixels allow it; with fewer, each row costs more than its values


class WideRows:
    """Views batches as (N, rows, pixels * C), and repeats vectors of C values for each pixel of a row.

    Args:
        x: (N, C, ...), with channels innermost in memory.
        groups: n, of which each has vectors of its own; they are one behind the other in a vector of (n * C,).
    """

    def __init__(self, x: Tensor, groups: int):
        self._groups, self._channels = groups, x.shape[1]
        values = x[0].numel() // self._channels
        self._pixels = 1
        while self._pixels * 2 * self._channels <= WIDTH and values % (self._pixels * 2) == 0:
            self._pixels *= 2

    def view(self, x: Tensor) -> Tensor:
        """Return x, of the same memory."""
        return x.movedim(1, -1).reshape(len(x), -1, self._pixels * self._channels)

    def vector(self, of_channels: Tensor) -> Tensor:
        """Return (n, pixels * C): a row for each group."""
        return of_channels.view(self._groups, -1).repeat(1, self._pixels)
