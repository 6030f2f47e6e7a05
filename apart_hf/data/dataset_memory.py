"""Small images decoded once into memory, then augmented a whole batch at a time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from apart_hf.data.dataset_base import EpochDataset
from apart_hf.data.decoded_cache import DecodedCache
from apart_hf.data.splits import Split
from apart_hf.errors import ApartError
from apart_hf.utils.progress_bar import progress_bar

LARGEST = 2**32  # bytes of decoded images that are kept in memory unasked; Tiny-ImageNet takes 2.3e9 (2.1 GiB)
_AT_ONCE = 1000  # images decoded by one look-up


class OtherSize(ApartError):
    """An image that is larger or smaller than the others."""


def fits_in_memory(images: int, edge: int, padding: int, channels: int = 3) -> bool:
    """Tell whether so many images of edge x edge pixels, padded, take no more than `LARGEST`."""
    return _bytes(channels) * images * (edge + 2 * padding) ** 2 <= LARGEST


def _bytes(channels: int) -> int:
    """Return those of a pixel: four of RGB are gathered as one integer."""
    return 1 if channels == 1 else 4


def decode(
    split: Split,
    edge: int,
    *,
    channels: int = 3,
    skip_bad: bool = False,
    progress: str | None = None,
    cache: DecodedCache | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode every image of a split, all of one size, or take them as they were decoded before.

    Args:
        split: not a stream.
        edge: width and height that every image has, in pixels.
        channels: 1 of grey images, 3 of RGB.
        skip_bad: leave what cannot be decoded black.
        progress: title of a progress bar; None: no bar.
        cache: where decoded images are looked for, and kept; None: nowhere.

    Returns:
        Images, (N, edge, edge, 4) uint8, the fourth byte of a pixel zero, or grey ones (N, edge, edge, 1); and which
        were decoded, (N,) bool.

    Raises:
        ApartError: naming the first image that has another size or, unless `skip_bad`, cannot be decoded.
    """
    key = None if cache is None else cache.key(split, edge, channels)
    if cache is not None and key is not None:
        found = cache.load(key)
        if found is not None and (skip_bad or bool(found[1].all())):  # else the first bad image is to be named
            return found
    decoded, good = _decode(split, edge, channels, skip_bad, progress)
    if cache is not None and key is not None:
        cache.save(key, decoded, good)
    return decoded, good


def _decode(split: Split, edge: int, channels: int, skip_bad: bool, progress: str | None) -> tuple[Tensor, Tensor]:
    decoded = torch.zeros(len(split), edge, edge, _bytes(channels), dtype=torch.uint8)
    good = torch.zeros(len(split), dtype=torch.bool)
    for start in progress_bar(range(0, len(split), _AT_ONCE), progress, unit="k images"):
        indices = list(range(start, min(start + _AT_ONCE, len(split))))
        for index, image, _ in split.images(indices, skip_bad=skip_bad):
            if image.size != (edge, edge):
                raise OtherSize(
                    f"{split.place(index)} has {image.size[0]}x{image.size[1]} pixels, others {edge}x{edge}; use "
                    "--loader workers, which resizes."
                )
            pixels = np.array(image.convert("L") if channels == 1 else image)
            decoded[index, ..., :channels] = torch.from_numpy(pixels.reshape(edge, edge, channels))
            good[index] = True
    return decoded, good


class InMemoryImages(EpochDataset, torch.utils.data.Dataset):
    """Makes batches of (images (B, C, H, W) float32, class indices (B,)) from decoded images.

    Training images are padded with black, cropped at random and flipped: torchvision's `RandomCrop(size, padding)`,
    `RandomHorizontalFlip`, `ToTensor` and `Normalize` with all their probabilities, but for a batch at once. What is
    drawn depends on (seed, epoch, the batch's own indices) alone, so that any batch can be drawn again.

    Give it to a DataLoader with `collate_fn=InMemoryImages.collate`; it hands over whole batches.

    Args:
        decoded: from `decode`; kept on `device`.
        labels: (N,) class indices.
        mean, std: per channel, of pixels in [0, 1].
        padding: pixels on each side before the crop.
        flip: whether to flip images at random.
        hflip, vflip: the probabilities of that.
        seed: of what is drawn.
        device: where batches are made.
        skipped: images that were left out, for `take_skipped`.
    """

    def __init__(
        self,
        decoded: Tensor,
        labels: np.ndarray,
        mean: Iterable[float],
        std: Iterable[float],
        *,
        padding: int = 0,
        flip: bool = False,
        hflip: float = 0.5,
        vflip: float = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        skipped: int = 0,
    ):
        super().__init__()
        self._left_out = skipped
        self.edge, self.padding, self.seed = decoded.shape[1], padding, seed
        self.flip = flip
        self.flips = (hflip, vflip) if flip else (0.0, 0.0)
        if padding:
            decoded = torch.nn.functional.pad(decoded, (0, 0, padding, padding, padding, padding))
        decoded = decoded.contiguous()
        # four bytes a pixel are gathered as one integer
        self.pixels = (decoded.view(torch.int32) if decoded.shape[-1] == 4 else decoded).squeeze(-1).to(device)
        self.labels = torch.from_numpy(np.array(labels, dtype=np.int64)).to(device)
        self.mean, self.std = (torch.tensor(tuple(v), device=device).view(1, -1, 1, 1) for v in (mean, std))
        self.steps = torch.arange(self.edge, device=device)

    def __len__(self) -> int:
        return len(self.labels)

    def take_skipped(self) -> int:
        """Count the images passed over: they are the same in every epoch."""
        return self._left_out

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(indices, device=self.pixels.device)
        if self.padding or any(self.flips):
            found = self._augmented(rows, np.random.default_rng([self.seed, self.epoch, *indices]))
        else:
            found = self.pixels.index_select(0, rows)
        bytes_of = found.view(torch.uint8).view(len(rows), self.edge, self.edge, -1)
        channels = bytes_of[..., : self.mean.numel()].permute(0, 3, 1, 2)
        images = channels.to(torch.float32, memory_format=torch.contiguous_format)
        return images.div_(255).sub_(self.mean).div_(self.std), self.labels[rows]

    def _augmented(self, rows: Tensor, rng: np.random.Generator) -> Tensor:
        """Crop the padded images, (B, H, W), and flip some of them."""
        corners = torch.from_numpy(rng.integers(2 * self.padding + 1, size=(2, len(rows), 1)))
        top, left = corners.to(rows.device)
        across, down = (self._flipped(rng, len(rows), probability) for probability in self.flips)
        across, down = across + left, down + top
        width = self.pixels.shape[-1]
        lines = rows.view(-1, 1) * self.pixels.shape[1] + down
        return self.pixels.view(-1).take(lines.unsqueeze(-1) * width + across.unsqueeze(1))

    def _flipped(self, rng: np.random.Generator, count: int, probability: float) -> Tensor:
        """Draw the order in which the pixels of an edge are taken: (B, edge), or (1, edge) where there is no chance."""
        if not probability:
            return self.steps.view(1, -1)
        drawn = rng.integers(2, size=(count, 1)) if probability == 0.5 else rng.random((count, 1)) < probability
        chosen = torch.from_numpy(drawn).to(self.steps.device)
        return torch.where(chosen == 1, self.edge - 1 - self.steps, self.steps)

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch
