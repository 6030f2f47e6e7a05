"""Plots of a run, readable without colour."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from apart_hf.results import Difference

MARKERS, LINES = "os^DvPX*<>phd8", ("-", "--", "-.", ":")


def plain(text: str) -> str:
    """Text that a figure shows as it is: a dollar sign would begin mathematics, a first underscore hides a label."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def styles() -> Iterator[tuple[str, str]]:
    """(marker, line) for one curve after another, 56 of them unlike each other without their colours."""
    for number in itertools.count():
        yield MARKERS[number % len(MARKERS)], LINES[(number + number // len(MARKERS)) % len(LINES)]


def plot_training(history: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss and top-1 accuracy by epoch, of training and evaluation, as PNG.

    Args:
        history: the lines of metrics.jsonl, one of them with an evaluation.
        path: the file to write.
        title: of the figure.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(plain(title))
    panels = [
        ("loss", [("training", "train_loss", "--o"), ("evaluation", "eval_loss", "-s")]),
        ("top-1 accuracy (%)", [("training", "train_top1", "--o"), ("evaluation", "top1", "-s")]),
    ]
    for axes, (label, lines) in zip(figure.subplots(1, 2), panels):
        for name, key, style in lines:
            points = [(line["epoch"], line[key]) for line in history if key in line]
            axes.plot(*zip(*points), style, label=name, markevery=max(1, len(points) // 12))
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def plot_gains(gains: list[tuple[str, float, Difference]], path: Path, title: str) -> None:
    """Gain in accuracy over cost, with confidence intervals, as PNG. What costs the same stands side by side.

    Args:
        gains: (name, cost in units of plain training, gain in per cent).
        path: the file to write.
        title: of the figure.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    of_cost = Counter(round(cost, 2) for _, cost, _ in gains)
    placed = Counter()
    for (name, cost, gain), (marker, _) in zip(gains, styles()):
        beside = placed[round(cost, 2)] - (of_cost[round(cost, 2)] - 1) / 2
        placed[round(cost, 2)] += 1
        axes.errorbar(cost + 0.035 * beside, gain.mean, gain.half_width, marker=marker, capsize=3, linestyle="none",
                      label=name)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set(xlabel="cost (passes over the data, plain training = 1; equal costs stand side by side)", title=title,
             ylabel="gain in top-1 accuracy over plain training (percentage points)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)
