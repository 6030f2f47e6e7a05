"""Images that are decoded and transformed one by one, at every use."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image as PIL
from torch import Tensor

from apart_hf.data.dataset_base import EpochDataset, seeded
from apart_hf.data.decoding import IGNORED, BadImage, bad_image, rgb
from apart_hf.data.splits import Split

_TRIES = 100
_BLACK = PIL.new("RGB", (64, 64))


class TransformedImages(EpochDataset, torch.utils.data.Dataset):
    """Gives (image tensor (C, H, W), class index) of each row of a split, by its position.

    What a training transform draws depends on (seed, epoch, the batch's own indices) alone, so that any batch can be
    drawn again, by any number of loader processes.

    Args:
        split: not a stream.
        transform: from an RGB image to a tensor.
        training: draw by seed and epoch.
        seed: of what is drawn.
        skip_bad: in place of an image that cannot be decoded, training takes another one, drawn at random, and
            evaluation a black one of class `IGNORED`; else such an image is an ApartError that names it.
        workers: loader processes that will ask.
    """

    def __init__(
        self,
        split: Split,
        transform: Callable,
        *,
        training: bool = False,
        seed: int = 0,
        skip_bad: bool = False,
        workers: int = 0,
    ):
        super().__init__(workers)
        # of rows, so that one which was read ahead of a checkpoint, and is read again after it, counts once
        self._bad = torch.zeros(len(split), dtype=torch.bool).share_memory_()
        self.split, self.transform, self.training, self.seed = split, transform, training, seed
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self.split)

    def skipped_rows(self) -> list[int]:
        """List the positions of the rows that were passed over since the last `take_skipped`."""
        return self._bad.nonzero().flatten().tolist()

    def mark_skipped(self, rows: list[int]) -> None:
        """Count these rows as passed over, too."""
        self._bad[rows] = True

    def take_skipped(self) -> int:
        """Count the rows passed over since the last call."""
        count = int(self._bad.sum())
        self._bad.zero_()
        return count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """Return the samples of a whole batch, as a DataLoader asks for it."""
        cells = self.split.cells(indices)
        if not self.training:
            return [self._sample(index, *cell) for index, cell in zip(indices, cells)]
        with seeded(self.seed, self.epoch, *indices):
            return [self._sample(index, *cell) for index, cell in zip(indices, cells)]

    def _sample(self, index: int, encoded: dict | None, label: int) -> tuple[Tensor, int]:
        try:
            return self.transform(rgb(encoded)), label
        except BadImage as error:
            if not self.skip_bad:
                raise bad_image(self.split.place(index), error) from error
            self._bad[index] = True
            return self._instead(index, error)

    def _instead(self, index: int, error: BadImage) -> tuple[Tensor, int]:
        if not self.training:
            return torch.zeros_like(self.transform(_BLACK)), IGNORED
        others = np.random.default_rng([self.seed, self.epoch, index]).integers(len(self.split), size=_TRIES)
        for other in others.tolist():
            ((encoded, label),) = self.split.cells([other])
            try:
                return self.transform(rgb(encoded)), label
            except BadImage:
                continue
        raise bad_image(f"{self.split.place(index)}, like {_TRIES} others drawn in its place,", error) from error
