"""What a run says of its data, and the curves that it leaves."""

from __future__ import annotations

import itertools
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from apart_hf.config.train_config import TrainConfig
from apart_hf.data import DATASETS, ImageData, registered
from apart_hf.runs.history import History
from apart_hf.training.epoch_metrics import EpochMetrics, Evaluation
from apart_hf.utils.plotting import plain, save


def describe_data(config: TrainConfig, data: ImageData, input_size: tuple[int, int, int], loader: str) -> list[str]:
    """Say in words what is trained and evaluated on."""
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
    lines.append(f"data: {describe_columns(data)}")
    lines += [f"data: {note}." for note in data.notes]
    if data.timm is not None:
        lines.append(f"data: {data.timm}.")
    if data.sizes is not None and data.sizes.note is not None:
        lines.append(f"data: {data.sizes.note}.")
    if config.val_fraction is not None:
        test = f"split {data.test.name!r} is looked at once, at the end" if data.test else "there is no test split"
        lines.append(f"data: evaluation is on {config.val_fraction:g} of split {data.train.name!r}; {test}")
    return lines


def describe_columns(data: ImageData) -> str:
    """Say which splits and columns the images and labels are from."""
    spec = data.spec
    names = [name for name in (spec.train_split, spec.val_split) if name is not None]
    if data.labels_from is not None:
        return f"splits {', '.join(names)} of {spec.path}; labels are told by {data.labels_from}"
    return f"splits {', '.join(names)}; images from column {spec.input_key!r}, labels from {spec.target_key!r}"


def describe_epoch(metrics: EpochMetrics) -> list[str]:
    """Say in lines what an epoch gave."""
    trained, evaluation = metrics.trained, metrics.evaluation
    parts = [f"epoch {metrics.epoch}: train loss {trained.train_loss:.3f}, top-1 {trained.train_top1:.1f} %"]
    if evaluation is not None:
        parts.append(
            f"eval loss {evaluation.eval_loss:.3f}, top-1 {evaluation.top1:.2f} %, top-5 {evaluation.top5:.2f} %"
        )
    parts.append(f"{trained.images_per_second:.0f} images/s, {trained.seconds:.1f} s, lr {metrics.lr:g}")
    lines = [" | ".join(parts)]
    if metrics.skipped_steps:
        lines.append(
            f"epoch {metrics.epoch}: {metrics.skipped_steps} step(s) left out for a loss or gradient that is not finite"
        )
    left_out = 0 if evaluation is None else evaluation.eval_skipped or 0
    if metrics.train_skipped or left_out:
        lines.append(
            f"epoch {metrics.epoch}: images that cannot be decoded: {metrics.train_skipped} passed over in training, "
            f"{left_out} left out of the evaluation"
        )
    return lines


def describe_test(split: str, name: str, epoch: int, evaluation: Evaluation) -> str:
    """Say what weights, "last" or "best", give on the test split."""
    skipped = f"; {evaluation.eval_skipped} bad images left out" if evaluation.eval_skipped else ""
    return (
        f"test: split {split!r}, {name} (epoch {epoch}): loss {evaluation.eval_loss:.3f}, "
        f"top-1 {evaluation.top1:.2f} %, top-5 {evaluation.top5:.2f} %{skipped}"
    )


def plot_training(history: History, path: Path, title: str) -> None:
    """Draw loss, top-1 accuracy and learning rate by epoch as PNG, and mark the best epoch.

    Args:
        history: of a run; one epoch of it was evaluated.
        path: the file to write.
        title: of the figure.
    """
    measured = [metrics.as_line() for metrics in history.epochs]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.suptitle(plain(title))
    panels = [
        ("loss", [("training", "train_loss", "--o"), ("evaluation", "eval_loss", "-s")]),
        ("top-1 accuracy (%)", [("training", "train_top1", "--o"), ("evaluation", "top1", "-s")]),
        ("learning rate", [("at the end of the epoch", "lr", "-^")]),
    ]
    best = history.best()
    for axes, (label, lines) in zip(figure.subplots(1, 3), panels):
        for name, key, style in lines:
            points = [(line["epoch"], line[key]) for line in measured if key in line]
            axes.plot(*zip(*points), style, label=name, markevery=max(1, len(points) // 12))
        if best is not None:
            named = f"best by {history.metric}: epoch {best.epoch}"
            axes.axvline(best.epoch, color="0.4", linestyle=":", label=named)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    if _falls_in_steps([line["lr"] for line in measured]):
        axes.set_yscale("log")
    for axes in figure.axes:
        axes.legend(fontsize=8)
    save(figure, path)


def _falls_in_steps(rates: list[float]) -> bool:
    """Tell whether learning rates mostly stay from epoch to epoch, and fall far: then steps are factors."""
    stays = sum(one == other for one, other in itertools.pairwise(rates))
    return min(rates) > 0 and max(rates) >= 10 * min(rates) and 2 * stays >= len(rates) - 1
