"""Figures 1 and 2 of the paper, and gain over cost, readable without colour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from apart_hf.utils.plotting import plain, save, styles

if TYPE_CHECKING:
    from apart_hf.paper.results import Difference


Rows = list[dict[str, Any]]


def plot_attack(rows: Rows, path: Path, title: str) -> None:
    """Draw Figure 1 as PNG: training accuracy by radius, a curve for each perturbation and number of groups.

    Args:
        rows: of `bn_robustness.attack`, with the model's name as "model".
        path: the file to write.
        title: of the figure.
    """
    names = {"apart": "APART's attack", "uniform": "uniform noise", "signs": "random signs"}
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    _draw(axes, rows, lambda row: f"{names[row['perturbation']]}, n = {row['groups']}")
    axes.set_title(plain(f"{rows[0]['model']}\n{title}"), fontsize=10, wrap=True)
    axes.set(xlabel="perturbation radius ε (share of batch mean and scale)", ylabel="training accuracy (%)")
    axes.legend()
    save(figure, path)


def plot_robustness(rows: Rows, path: Path, title: str) -> None:
    """Draw Figure 2 as PNG: test accuracy by radius of perturbed means and deviations, a curve for each model.

    Args:
        rows: of `bn_robustness.robustness`, with the model's name as "model".
        path: the file to write.
        title: of the figure.
    """
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    figure.suptitle(plain(title))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, statistic in zip(panels, ("mean", "std")):
        _draw(axes, [row for row in rows if row["statistic"] == statistic], lambda row: plain(row["model"]))
        axes.set(title=f"running {statistic} times 1 ± ε", xlabel="perturbation radius ε (relative)")
        axes.tick_params(labelleft=True)
    panels[0].set(ylabel="test accuracy (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)


def _draw(axes: Axes, rows: Rows, name_of: Callable[[dict[str, Any]], str]) -> None:
    """Draw a curve for each name: the mean over draws, and a band from their smallest to their largest."""
    curves: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        curves.setdefault(name_of(row), {}).setdefault(row["epsilon"], []).append(row["top1"])
    for (name, points), (marker, line) in zip(curves.items(), styles()):
        radii, found = list(points), list(points.values())
        (curve,) = axes.plot(radii, [mean(values) for values in found], line, marker=marker, label=name)
        if max(map(len, found)) > 1:
            axes.fill_between(
                radii,
                [min(values) for values in found],
                [max(values) for values in found],
                color=curve.get_color(),
                alpha=0.15,
                linewidth=0,
            )
    axes.grid(alpha=0.3)


def plot_gains(gains: list[tuple[str, float, Difference]], path: Path, title: str) -> None:
    """Draw the gain in accuracy over cost, with confidence intervals, as PNG.

    What costs the same stands side by side, at one tick.

    Args:
        gains: (name, cost in units of plain training, gain in per cent).
        path: the file to write.
        title: of the figure.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    of_cost = Counter(round(cost, 2) for _, cost, _ in gains)
    placed: Counter[float] = Counter()
    for (name, cost, gain), (marker, _) in zip(gains, styles()):
        beside = placed[round(cost, 2)] - (of_cost[round(cost, 2)] - 1) / 2
        placed[round(cost, 2)] += 1
        axes.errorbar(
            cost + 0.035 * beside, gain.mean, gain.half_width, marker=marker, capsize=3, linestyle="none", label=name
        )
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xticks(sorted(of_cost), [f"{cost:g}" for cost in sorted(of_cost)])
    axes.set(
        xlim=(min(of_cost) - 0.3, max(of_cost) + 0.3),
        xlabel="cost (plain training = 1; rows of one cost stand side by side)",
        title=title,
        ylabel="gain in top-1 accuracy over plain training (percentage points)",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    save(figure, path)
