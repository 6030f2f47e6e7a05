"""Pictures of an evaluation, class by class: the confusion matrix, and the accuracy on each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from apart_hf.runs.confusion import LISTED, Confusion
from apart_hf.utils.plotting import DPI, plain, save, shortened

COUNTED = 20  # classes up to which the cells of the matrix have numbers
NAMED = 60  # classes up to which each has its name
_LETTERS = 22  # of a class's name
_PIXELS = 1000  # of the matrix of many classes: it is summed over blocks where there are more


def plot_confusion(confusion: Confusion, path: Path, title: str) -> None:
    """Draw the confusion matrix as PNG: a row for each class, in which the colour of a column is its share.

    Up to `COUNTED` classes cells have numbers, up to `NAMED` rows have names; of more classes the pairs that are
    confused most are listed beside it.

    Args:
        confusion: of an evaluation.
        path: the file to write.
        title: of the figure.
    """
    classes, matrix = len(confusion.names), confusion.blocks(_PIXELS)
    counted, named = classes <= COUNTED, classes <= NAMED
    edge = max(2.0, 0.4 * classes) if counted else 0.16 * classes if named else max(6.0, len(matrix) / DPI)
    figure = Figure(figsize=(edge + 5, edge))
    axes = _axes(figure, 0, edge)
    axes.set_title(plain(title), loc="left", fontsize=11)
    rows = matrix.sum(axis=1, keepdims=True)
    shares = 100 * np.divide(matrix, rows, out=np.zeros(matrix.shape), where=rows > 0)
    # of many classes the small shares are what there is to see
    norm = PowerNorm(1.0 if counted else 0.5, vmin=0, vmax=100)
    image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest", aspect="auto")
    figure.colorbar(image, cax=_axes(figure, edge + 0.15, 0.15), label="share of the class (%)")
    axes.set(xlabel="predicted class", ylabel="class")
    if named:
        names = [shortened(name, _LETTERS) for name in confusion.names]
        size = 9 if counted else 7
        axes.set_xticks(range(classes), names, rotation=90, fontsize=size)
        axes.set_yticks(range(classes), names, fontsize=size)
    elif len(matrix) < classes:
        axes.set(xticks=[], yticks=[])
    if counted:
        for row, column in zip(*np.nonzero(matrix)):
            count, color = matrix[row, column], "white" if shares[row, column] > 55 else "black"
            size = 8 if count < 1000 else 6
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=size)
    else:
        _list(
            _axes(figure, edge + 1.1, 3.5), "confused most", [_pair(confusion, *pair) for pair in confusion.confused()]
        )
    save(figure, path, bbox_inches="tight")


def _axes(figure: Figure, left: float, width: float) -> Axes:
    """Add axes of the figure's height, at so many inches; names around them are no part of that."""
    whole = figure.get_figwidth()
    return figure.add_axes((left / whole, 0, width / whole, 1))


def _pair(confusion: Confusion, truth: int, guess: int, images: int) -> str:
    names = [shortened(confusion.names[index], _LETTERS) for index in (truth, guess)]
    return f"{names[0]} → {names[1]}: {images} of {confusion.images[truth]}"


def _list(axes: Axes, heading: str, lines: list[str]) -> None:
    axes.axis("off")
    axes.text(0, 1, "\n".join([heading, "", *lines]), va="top", fontsize=9, linespacing=1.5)


def plot_accuracy(confusion: Confusion, path: Path, title: str) -> None:
    """Draw the accuracy on each class as PNG, the lowest first; of many classes the curve, and the lowest by name.

    Args:
        confusion: of an evaluation.
        path: the file to write.
        title: of the figure.
    """
    there = np.flatnonzero(confusion.images)
    order = there[np.argsort(confusion.accuracy[there], kind="stable")]
    accuracy, named = confusion.accuracy[order], len(confusion.names) <= NAMED
    names = [
        f"{shortened(confusion.names[i], _LETTERS)}: {confusion.correct[i]} of {confusion.images[i]}" for i in order
    ]
    figure = Figure(figsize=(5 if named else 9.5, 0.2 * len(order) if named else 4.6))
    axes = _axes(figure, 0, 5 if named else 6)
    axes.set_title(f"{plain(title)}\ndashed: all images, {confusion.top1:.2f} %", loc="left", fontsize=11)
    if named:
        axes.barh(range(len(order)), accuracy, color="0.75")
        axes.set_yticks(range(len(order)), names, fontsize=8)
        axes.set(xlim=(0, 100), ylim=(len(order) - 0.5, -0.5), xlabel="accuracy (%)")
        axes.axvline(confusion.top1, color="C0", linestyle="--")
    else:
        axes.plot(range(1, len(order) + 1), accuracy, color="black")
        axes.set(ylim=(0, 100), xlabel="classes, the lowest first", ylabel="accuracy (%)")
        axes.axhline(confusion.top1, color="C0", linestyle="--")
        _list(_axes(figure, 6.3, 3), "lowest accuracy", names[:LISTED])
    axes.grid(axis="x" if named else "both", alpha=0.3)
    save(figure, path, bbox_inches="tight")
