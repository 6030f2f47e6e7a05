"""What a run says of its data, and the curves that it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from apart_hf.config.train_config import TrainConfig
from apart_hf.data import DATASETS, ImageData, registered
from apart_hf.utils.plotting import plain


def describe_data(config: TrainConfig, data: ImageData, input_size: tuple[int, int, int], loader: str) -> list[str]:
    """What is trained and evaluated on, in words."""
    lines = []
    if registered(config.dataset, config.data_dir) is DATASETS["demo"]:
        lines.append(
            "data: the bundled demo set, 7,000 images of Fashion-MNIST. For real data: --dataset cifar100 (or "
            f"{', '.join(name for name in DATASETS if name not in ('demo', 'cifar100'))}), or --data-dir FOLDER."
        )
    count = "streamed" if data.val.size is None else f"{len(data.val):,}"
    loader = "stream" if data.train.streamed else loader
    lines.append(
        f"data: {len(data.train):,} training and {count} evaluation images, {len(data.class_names)} classes, "
        f"input {'x'.join(map(str, input_size))}, loader: {loader}"
    )
    if config.val_fraction is not None:
        test = f"split {data.test.name!r} is looked at once, at the end" if data.test else "there is no test split"
        lines.append(f"data: evaluation is on {config.val_fraction:g} of split {data.train.name!r}; {test}")
    return lines


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
