"""Accuracy of trained models on corrupted images, by the running statistics of the training or by ones of these images.

An image is corrupted as the dataset has it, 8 bits a channel and in its own size, before it is resized, cropped and
normalised for a model: all models see the same images. What is drawn for it depends on its row in the split, the
corruption, the severity and the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image as PIL
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from apart_hf.data import Split
from apart_hf.data.decoding import rgb
from apart_hf.errors import ApartError
from apart_hf.paper.corruptions import SMALLEST, corrupt, corruption_number
from apart_hf.paper.recalibration import Estimate, halves, has_running_statistics
from apart_hf.utils.processes import in_a_group_of_its_own
from apart_hf.utils.progress_bar import progress_bar

Corruption = tuple[str, int]  # name and severity
Numbered = tuple[int, nn.Module]  # position of a contender, and a network in its place


@dataclass(frozen=True)
class Contender:
    """Holds a model that is measured.

    Args:
        name: what it is called.
        network: in eval mode, on the device that computes; left as it is.
        transform: from an RGB image to its input.
        labels: (rows of the split,) class indices, in the order of its outputs.
    """

    name: str
    network: nn.Module
    transform: Callable[[PIL.Image], Tensor]
    labels: np.ndarray


@dataclass(frozen=True)
class Accuracy:
    """Holds top-1 accuracies in per cent of one model on some images.

    Args:
        top1: with its own running statistics.
        top1_recalibrated: with those of the other half of the same images; None: it was not asked for, or the model
            keeps none.
    """

    top1: float
    top1_recalibrated: float | None = None

    @classmethod
    def mean(cls, found: Sequence[Accuracy]) -> Accuracy:
        """Return the mean of several."""
        again = [one.top1_recalibrated for one in found if one.top1_recalibrated is not None]
        return cls(fmean(one.top1 for one in found), fmean(again) if again else None)


@dataclass(frozen=True)
class Robustness:
    """Holds what was measured of one model.

    Args:
        name: of the model.
        clean: on the images as they are.
        corrupted: by corruption and severity, in the order in which they were asked for.
    """

    name: str
    clean: Accuracy
    corrupted: dict[Corruption, Accuracy]

    def of_corruption(self, name: str) -> Accuracy:
        """Return the mean over the severities of a corruption."""
        return Accuracy.mean([found for (other, _), found in self.corrupted.items() if other == name])

    def of_severity(self, severity: int) -> Accuracy:
        """Return the mean over the corruptions of a severity."""
        return Accuracy.mean([found for (_, other), found in self.corrupted.items() if other == severity])

    @property
    def mean(self) -> Accuracy:
        """Return the mean over all corruptions and severities."""
        return Accuracy.mean(list(self.corrupted.values()))


def readable_rows(split: Split, rows: np.ndarray, skip_bad: bool) -> np.ndarray:
    """Return the rows whose images can be corrupted, each of which is looked at once before hours are spent on them.

    Raises:
        ApartError: naming the first that is too small or, unless `skip_bad`, cannot be decoded; and where none can.
    """
    good = []
    for row in progress_bar(rows.tolist(), f"reading split {split.name}", unit="image"):
        for _, image, _ in split.images([row], skip_bad=skip_bad):
            if min(image.size) < SMALLEST:
                raise ApartError(
                    f"{split.place(row)} has {image.width}x{image.height} pixels; corruptions need at least "
                    f"{SMALLEST}x{SMALLEST}: name data with larger images."
                )
            good.append(row)
    if not good:
        raise ApartError(f"no image of split {split.name!r} can be decoded.")
    return np.array(good)


class _CorruptedImages(Dataset):
    """Gives (inputs of the models, position) of the rows of a split under one corruption; None: as they are."""

    def __init__(
        self,
        split: Split,
        rows: np.ndarray,
        transforms: Sequence[Callable[[PIL.Image], Tensor]],
        corruption: Corruption | None,
        seed: int,
    ):
        self.split, self.rows, self.transforms, self.seed = split, rows, transforms, seed
        self.corruption = corruption

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[tuple[Tensor, ...], int]:
        row = int(self.rows[position])
        ((encoded, _),) = self.split.cells([row])
        image = rgb(encoded)
        if self.corruption is not None:
            name, severity = self.corruption
            seed = (row, corruption_number(name), severity, self.seed)
            image = PIL.fromarray(corrupt(np.asarray(image), name, severity, seed=seed))
        return tuple(transform(image) for transform in self.transforms), position


@dataclass(frozen=True)
class CorruptionTest:
    """Measures models on images of a split under corruptions.

    Args:
        contenders: the models.
        split: not a stream.
        rows: which of its images, see `readable_rows`; where statistics are estimated, in random order.
        corruptions: names and severities.
        seed: of what is drawn.
        recalibrated: measure with statistics of the other half of the images as well.
        batch_size: images at once, at most.
        workers: loader processes.
    """

    contenders: Sequence[Contender]
    split: Split
    rows: np.ndarray
    corruptions: Sequence[Corruption]
    seed: int = 0
    recalibrated: bool = False
    batch_size: int = 128
    workers: int = 0

    def run(self) -> list[Robustness]:
        """Measure every model, in the order of `contenders`.

        Raises:
            ApartError: where statistics are to be estimated on less than two images.
        """
        if self.recalibrated and len(self.rows) < 4:
            raise ApartError(f"--recalibrate: {len(self.rows)} images have no halves of two or more; take 4 or more.")
        cases: list[Corruption | None] = [None, *self.corruptions]
        found = {case: self._accuracies(case) for case in progress_bar(cases, "corruptions", unit="severity")}
        return [
            Robustness(one.name, found[None][index], {case: found[case][index] for case in self.corruptions})
            for index, one in enumerate(self.contenders)
        ]

    def _accuracies(self, case: Corruption | None) -> list[Accuracy]:
        models = list(enumerate(one.network for one in self.contenders))
        able = [index for index, network in models if self.recalibrated and has_running_statistics(network)]
        share = 100 / len(self.rows)
        if not able:
            return [Accuracy(share * hits) for hits in self._hits(case, torch.arange(len(self.rows)), models)]
        plain, again = [0] * len(models), dict.fromkeys(able, 0)
        for estimated, evaluated in halves(len(self.rows)):
            hits = self._hits(case, evaluated, [*models, *self._recalibrated(case, estimated, able)])
            plain = [one + more for one, more in zip(plain, hits)]
            again = {index: again[index] + more for index, more in zip(able, hits[len(models) :])}
        return [
            Accuracy(share * one, share * again[index] if index in again else None) for index, one in enumerate(plain)
        ]

    def _recalibrated(self, case: Corruption | None, positions: Tensor, able: Sequence[int]) -> list[Numbered]:
        """Copy these models with the statistics of these images."""
        estimates = [(index, Estimate(self.contenders[index].network)) for index in able]
        for inputs, _ in self._batches(case, positions):
            for index, estimate in estimates:
                estimate.add(inputs[index])
        return [(index, estimate.finish()) for index, estimate in estimates]

    @torch.no_grad()
    def _hits(self, case: Corruption | None, positions: Tensor, networks: Sequence[Numbered]) -> list[int]:
        """Count the images that each network is right about."""
        labels = [torch.from_numpy(one.labels[self.rows].astype(np.int64)) for one in self.contenders]
        hits = [0] * len(networks)
        for inputs, places in self._batches(case, positions):
            for place, (index, network) in enumerate(networks):
                hits[place] += int((network(inputs[index]).argmax(-1).cpu() == labels[index][places]).sum())
        return hits

    def _batches(self, case: Corruption | None, positions: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Give (input of each contender, positions) of batches of equal size, but for one: none has a single image."""
        devices = [next(one.network.parameters()).device for one in self.contenders]
        dataset = _CorruptedImages(self.split, self.rows, [one.transform for one in self.contenders], case, self.seed)
        count = -(-len(positions) // self.batch_size)
        loader = DataLoader(
            dataset,
            batch_sampler=[part.tolist() for part in positions.tensor_split(count)],
            num_workers=self.workers,
            worker_init_fn=in_a_group_of_its_own if self.workers else None,
        )
        for inputs, places in loader:
            yield [images.to(device) for images, device in zip(inputs, devices)], places


def as_record(found: Sequence[Robustness]) -> list[dict[str, Any]]:
    """Return what was measured as JSON has it."""
    return [
        {
            "model": one.name,
            "clean": _there(one.clean),
            "mean": _there(one.mean),
            "corruptions": [
                {"corruption": name, "severity": severity, **_there(accuracy)}
                for (name, severity), accuracy in one.corrupted.items()
            ],
        }
        for one in found
    ]


def _there(accuracy: Accuracy) -> dict[str, float]:
    return {key: value for key, value in vars(accuracy).items() if value is not None}
