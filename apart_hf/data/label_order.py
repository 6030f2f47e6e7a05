"""Whether the labels of a stream come in an order, as those of a sorted file do."""

from __future__ import annotations

import math

import torch

_FEW = 16  # changes that are expected; below, chance decides
_DEVIATIONS = 5  # standard ones
_TIMES = 1.5  # as many neighbours of one class as by chance, or as much fewer changes, are an order


class LabelOrder:
    """Counts labels as each loader process gives them, in memory that these share with the main process.

    Neighbours that are of one class more often than in a random order of the same labels (the runs test of Wald and
    Wolfowitz for several classes) say that the data come in an order that the shuffle buffer does not undo. A rare
    class is no order: what counts is how often it would have neighbours of its own by chance.

    Args:
        classes: labels are below.
        writers: processes that count.
    """

    def __init__(self, classes: int, writers: int):
        self._counts = torch.zeros(writers, classes, dtype=torch.int64).share_memory_()
        self._changes = torch.zeros(writers, dtype=torch.int64).share_memory_()
        self._latest: int | None = None  # of this process

    def add(self, writer: int, label: int) -> None:
        """Count a label after the one before it."""
        if self._latest is not None and label != self._latest:
            self._changes.numpy()[writer] += 1
        self._latest = label
        self._counts.numpy()[writer, label] += 1

    def same(self) -> tuple[float, float] | None:
        """Compare how many neighbours are of one class with how many would be by chance.

        Returns:
            Both shares, where these differ by more than chance and much; None: no order shows.
        """
        counts = self._counts.numpy()
        seen = counts.sum(axis=1)
        pairs = int((seen - 1).clip(0).sum())
        classes = counts.sum(axis=0)
        total = int(classes.sum())
        if total < 2 or not pairs:
            return None
        changes = float(self._changes.numpy().sum())
        squares, cubes = float((classes.astype(float) ** 2).sum()), float((classes.astype(float) ** 3).sum())
        chance = (total**2 - squares) / (total * (total - 1))  # of a change between neighbours
        variance = squares * (squares + total * (total + 1)) - 2 * total * cubes - float(total) ** 3
        deviation = math.sqrt(max(variance, 0.0) / (float(total) ** 2 * (total - 1)) * pairs / total)
        expected = pairs * chance
        if expected < _FEW or changes > expected - _DEVIATIONS * max(deviation, 1.0):
            return None
        same, by_chance = 1 - changes / pairs, 1 - chance
        is_much = changes * _TIMES <= expected or same >= _TIMES * by_chance
        return (same, by_chance) if is_much else None
