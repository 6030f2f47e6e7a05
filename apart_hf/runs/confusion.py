"""How often the images of each class are taken for which: the numbers of an evaluation, class by class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from apart_hf.training.predictions import Predictions

LISTED = 20  # of the most confused pairs
DENSE = 1000  # classes up to which the matrix is written with its zeros


@dataclass(frozen=True)
class Confusion:
    """Holds the entries of a confusion matrix that are not zero, in the order of the classes.

    Args:
        names: of the classes, by index.
        truth, predicted, counts: (K,) class index, index of the class that it is taken for, and images of it that are.
    """

    names: list[str]
    truth: np.ndarray
    predicted: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, predictions: Predictions, names: list[str]) -> Confusion:
        """Count predictions."""
        codes, counts = np.unique(predictions.labels * len(names) + predictions.predicted, return_counts=True)
        truth, predicted = np.divmod(codes, len(names))
        return cls(names, truth, predicted, counts)

    @cached_property
    def images(self) -> np.ndarray:
        """Return the images of each class, (classes,)."""
        return np.bincount(self.truth, self.counts, len(self.names)).astype(np.int64)

    @cached_property
    def correct(self) -> np.ndarray:
        """Return the images of each class that are recognised, (classes,)."""
        right = self.truth == self.predicted
        return np.bincount(self.truth[right], self.counts[right], len(self.names)).astype(np.int64)

    @cached_property
    def accuracy(self) -> np.ndarray:
        """Return the accuracy on each class in per cent, (classes,); NaN where there is no image of it."""
        return np.divide(100 * self.correct, self.images, out=np.full(len(self.names), np.nan), where=self.images > 0)

    @property
    def top1(self) -> float:
        """Return the accuracy on all images in per cent."""
        return float(100 * self.correct.sum() / self.images.sum())

    def blocks(self, size: int) -> np.ndarray:
        """Return the matrix, (classes, classes), summed over blocks so that it has no more than `size` rows."""
        block = -(-len(self.names) // size)
        rows = -(-len(self.names) // block)
        found = np.zeros((rows, rows), dtype=np.int64)
        np.add.at(found, (self.truth // block, self.predicted // block), self.counts)
        return found

    def confused(self, count: int = LISTED) -> list[tuple[int, int, int]]:
        """Return the pairs that are confused most, in order: class, class that it is taken for, images."""
        wrong = np.flatnonzero(self.truth != self.predicted)
        first = wrong[np.argsort(-self.counts[wrong], kind="stable")[:count]]
        return [(int(self.truth[i]), int(self.predicted[i]), int(self.counts[i])) for i in first]

    def totals(self) -> dict[str, Any]:
        """Return what holds of all images, by name."""
        images, correct = int(self.images.sum()), int(self.correct.sum())
        return {"images": images, "errors": images - correct, "top1": self.top1}

    def by_class(self) -> dict[str, Any]:
        """Return accuracy by class, and the most confused pairs, by name."""
        rows = zip(self.names, self.images.tolist(), self.correct.tolist(), self.accuracy.tolist())
        return {
            "classes": [
                {"class": name, "images": images, "correct": correct, "accuracy": accuracy if images else None}
                for name, images, correct, accuracy in rows
            ],
            "confused": [
                {"class": self.names[truth], "predicted": self.names[guess], "images": images}
                for truth, guess, images in self.confused()
            ],
        }

    def matrix(self) -> dict[str, Any]:
        """Return the matrix, a row for each class, a column for each prediction; of many classes its entries alone."""
        found: dict[str, Any] = {"classes": self.names}
        if len(self.names) <= DENSE:
            return found | {"matrix": self.blocks(DENSE).tolist()}
        return found | {"entries": np.stack([self.truth, self.predicted, self.counts], axis=1).tolist()}
