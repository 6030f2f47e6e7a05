"""Plots of a run, readable without colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def plot_training(history: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss and top-1 accuracy by epoch, of training and evaluation, as PNG.

    Args:
        history: the lines of metrics.jsonl.
        path: the file to write.
        title: of the figure.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    epochs = [line["epoch"] for line in history]
    panels = [
        ("loss", [("training", "train_loss", "--o"), ("evaluation", "eval_loss", "-s")]),
        ("top-1 accuracy (%)", [("training", "train_top1", "--o"), ("evaluation", "top1", "-s")]),
    ]
    for axes, (label, lines) in zip(figure.subplots(1, 2), panels):
        for name, key, style in lines:
            axes.plot(epochs, [line[key] for line in history], style, label=name, markevery=max(1, len(epochs) // 12))
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
