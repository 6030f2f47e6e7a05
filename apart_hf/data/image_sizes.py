"""Which size the images of a split have, where some have another one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

LOOKED_AT = 256  # images
_USUAL = 0.9  # share of them that decides


@dataclass(frozen=True)
class ImageSizes:
    """Holds the sizes of some images of a split.

    Args:
        found: (N, 2) widths and heights in pixels.
    """

    found: np.ndarray

    @classmethod
    def of(cls, sizes: Iterable[tuple[int, int]]) -> ImageSizes:
        """Take (width, height) of one image or more."""
        return cls(np.array(list(sizes), dtype=np.int64).reshape(-1, 2))

    @property
    def _most_frequent(self) -> tuple[tuple[int, int], int]:
        sizes, counts = np.unique(self.found, axis=0, return_counts=True)
        (width, height), count = sizes[counts.argmax()].tolist(), counts.max()
        return (width, height), int(count)

    @property
    def decided(self) -> tuple[int, int]:
        """Return the size (width, height) that nine in ten have, else a square of the median of the shorter edges."""
        size, count = self._most_frequent
        if count >= _USUAL * len(self.found):
            return size
        edge = int(np.median(self.found.min(axis=1)))
        return edge, edge

    @property
    def note(self) -> str | None:
        """Say in words how sizes differ, and which one is taken; None: they do not differ."""
        (width, height), count = self._most_frequent
        if count == len(self.found):
            return None
        shorter = self.found.min(axis=1)
        taken = "x".join(map(str, self.decided))
        is_usual = count >= _USUAL * len(self.found)
        how = "their size" if is_usual else "a square of the median of the shorter edges"
        return (
            f"images have several sizes: of {len(self.found)} looked at {count} have {width}x{height} pixels, and "
            f"shorter edges are {shorter.min()} to {shorter.max()}; they are taken for images of {taken} ({how})"
        )
