"""What a network says of the images of a split, and those that it is most sure of, and wrong.

They are kept while it is evaluated, so that a look at them needs no second pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import interpolate

from apart_hf.data import IGNORED

SHOWN = 25
EDGE = 128  # pixels that an image is kept with at most


@dataclass(frozen=True)
class Mistake:
    """Holds an image of which the network is wrong.

    Args:
        label, predicted: class indices.
        confidence: probability of the predicted class.
        position: of the image, where images are dealt to processes in turn, each in its own order.
        image: (C, H, W) as the network is given it, but for its size.
    """

    label: int
    predicted: int
    confidence: float
    position: int
    image: Tensor


@dataclass(frozen=True)
class Predictions:
    """Holds what a network says of the N images of a split that could be decoded.

    Args:
        labels: (N,) class indices.
        predicted: (N,) class indices, likewise.
        mistakes: the most confident ones, the first of them first.
    """

    labels: np.ndarray
    predicted: np.ndarray
    mistakes: list[Mistake]


class MostConfidentMistakes:
    """Collects those of one process on its device, without waiting for it.

    Args:
        count: how many.
    """

    def __init__(self, count: int):
        self.count, self._seen = count, 0
        self._kept: list[Tensor] = []  # confidences, labels, predicted classes, places, images

    def add(self, images: Tensor, labels: Tensor, predicted: Tensor, output: Tensor) -> None:
        """Look at a batch.

        Args:
            images: (B, C, H, W).
            labels: (B,) class indices; `IGNORED` stands for no image.
            predicted: (B,) class indices.
            output: (B, classes) logits.
        """
        confidence = (output.gather(1, predicted[:, None])[:, 0] - output.logsumexp(1)).exp()
        wrong = (predicted != labels) & (labels != IGNORED)
        places = torch.arange(self._seen, self._seen + len(labels), device=labels.device)
        self._seen += len(labels)
        new = self._best([torch.where(wrong, confidence, -1.0), labels, predicted, places, images])
        self._kept = self._best([torch.cat(pair) for pair in zip(self._kept, new)]) if self._kept else new

    def _best(self, columns: list[Tensor]) -> list[Tensor]:
        order = columns[0].topk(min(self.count, len(columns[0]))).indices
        return [column[order] for column in columns]

    def gathered(self, accelerator: Accelerator) -> list[Mistake]:
        """Return those of all processes, the most confident first."""
        found = gather_object(list(self._of_process(accelerator)))
        return sorted(found, key=lambda one: (-one.confidence, one.position))[: self.count]

    def _of_process(self, accelerator: Accelerator) -> Iterator[Mistake]:
        if not self._kept:
            return
        confidences, labels, predicted, places, images = self._kept
        if max(images.shape[-2:]) > EDGE:
            images = interpolate(images, scale_factor=EDGE / max(images.shape[-2:]), mode="area")
        positions = places * accelerator.num_processes + accelerator.process_index
        rows = zip(confidences.tolist(), labels.tolist(), predicted.tolist(), positions.tolist(), images.cpu())
        for confidence, label, guess, position, image in rows:
            if confidence >= 0:
                yield Mistake(label, guess, confidence, position, image.clone())
