"""Table and picture of accuracies on corrupted images, readable without colour."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from apart_hf.paper.corruption_robustness import Accuracy, Robustness
from apart_hf.utils.plotting import MARKERS, plain, save
from apart_hf.utils.text_table import markdown_table

AGAIN = "recalibrated"
COLOURS = ("#0b5394", "#b45f06", "#38761d", "#741b47", "#444444", "#990000")
_DASHES = ("--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)))
_ROW, _LANE = 0.16, 0.13  # inches of a corruption, and of each model in it


def render_corruptions(found: Sequence[Robustness]) -> str:
    """Render two tables of Markdown: means over severities by corruption, and means over corruptions by severity.

    Args:
        found: of one model or more, under the same corruptions.
    """
    names, severities = _cases(found[0])
    by_name = [
        _row("corruption", "none", [one.clean for one in found], found),
        *(_row("corruption", _words(name), [one.of_corruption(name) for one in found], found) for name in names),
        _row("corruption", "mean", [one.mean for one in found], found),
    ]
    by_severity = [
        *(_row("severity", str(number), [one.of_severity(number) for one in found], found) for number in severities),
        _row("severity", "mean", [one.mean for one in found], found),
    ]
    return f"{markdown_table(by_name)}\n{markdown_table(by_severity)}"


def _cases(one: Robustness) -> tuple[list[str], list[int]]:
    return list(dict.fromkeys(name for name, _ in one.corrupted)), sorted({number for _, number in one.corrupted})


def _words(name: str) -> str:
    return name.replace("_", " ")


def _row(kind: str, name: str, accuracies: Sequence[Accuracy], found: Sequence[Robustness]) -> dict[str, object]:
    row: dict[str, object] = {kind: name}
    for one, accuracy in zip(found, accuracies):
        row[one.name] = accuracy.top1
        if one.clean.top1_recalibrated is not None:
            row[f"{one.name}, {AGAIN}"] = accuracy.top1_recalibrated
    return row


def plot_corruptions(found: Sequence[Robustness], path: Path, title: str) -> None:
    """Draw accuracies as PNG: a row for each corruption, in it a lane for each model.

    A mark is the mean over severities, a line goes from the worst to the best of them, a dashed line is the accuracy on
    the images as they are; hollow marks are those of statistics that were estimated anew.

    Args:
        found: of one model or more, under the same corruptions.
        path: the file to write.
        title: of the figure.
    """
    names, severities = _cases(found[0])
    lanes = list(_lanes(found))
    figure = Figure(
        figsize=(8.6, 1.6 + 0.2 * len(lanes) + len(names) * (_ROW + _LANE * len(lanes))), layout="constrained"
    )
    axes = figure.subplots()
    for place, name in enumerate(names):
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color="0.94", zorder=0)
        for lane, (one, again, marker, colour) in enumerate(lanes):
            height = place + 0.72 * ((lane + 0.5) / len(lanes) - 0.5)
            values = [_of(accuracy, again) for (other, _), accuracy in one.corrupted.items() if other == name]
            axes.plot([min(values), max(values)], [height, height], color=colour, linewidth=1.2, zorder=2)
            axes.plot(
                _of(one.of_corruption(name), again),
                height,
                marker=marker,
                color=colour,
                markerfacecolor="white" if again else colour,
                markersize=5.5,
                zorder=3,
            )
    for one, dashes in zip(found, itertools.cycle(_DASHES)):
        colour = next(colour for other, _, _, colour in lanes if other is one)
        axes.axvline(one.clean.top1, color=colour, linestyle=dashes, linewidth=1.2, zorder=1)
    axes.set_yticks(range(len(names)), [_words(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -2.0), min(high, 102.0))
    spread = f"mean over severities {', '.join(map(str, severities))}, and line from worst to best"
    axes.set_xlabel(f"top-1 accuracy (%): {spread if len(severities) > 1 else f'severity {severities[0]}'}")
    axes.set_title(plain(title), fontsize=10, wrap=True)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(
        handles=[
            *(
                Line2D(
                    [],
                    [],
                    marker=marker,
                    color=colour,
                    markerfacecolor="white" if again else colour,
                    label=plain(
                        f"{one.name}{f', {AGAIN}' if again else ''}: {_of(one.mean, again):.1f} % in the mean, "
                        f"{_of(one.clean, again):.1f} % clean"
                    ),
                )
                for one, again, marker, colour in lanes
            ),
            Line2D([], [], color="0.3", linestyle="--", label="clean images, by the training's statistics"),
        ],
        loc="outside lower center",
        ncols=1,
        fontsize=9,
    )
    save(figure, path)


def _lanes(found: Sequence[Robustness]) -> Iterator[tuple[Robustness, bool, str, str]]:
    """Give (model, whether its statistics were estimated anew, marker, colour) from top to bottom."""
    for number, one in enumerate(found):
        marker, colour = MARKERS[number % len(MARKERS)], COLOURS[number % len(COLOURS)]
        yield one, False, marker, colour
        if one.clean.top1_recalibrated is not None:
            yield one, True, marker, colour


def _of(accuracy: Accuracy, again: bool) -> float:
    value = accuracy.top1_recalibrated if again else accuracy.top1
    assert value is not None  # there is a lane for it only where it was measured
    return value
