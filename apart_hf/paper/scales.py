"""How large the runs of a table are: the paper's setting, or a smaller one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reduction:
    """Describes a part of a dataset, in smaller images.

    Args:
        classes: the first so many.
        images: training images of each, drawn once; what is left of the training split is evaluated on as well.
        edge: of the images in pixels, averaged over squares.
    """

    classes: int
    images: int
    edge: int


@dataclass(frozen=True)
class Scale:
    """Says how large runs are.

    Args:
        summary: one line for `--help`.
        settings: of `TrainConfig`, in the place of the recipe's.
        reduction: of the dataset; None: all of it.
        groups: of the methods that have groups, where a row names none: another batch size takes another number. None:
            the recipe's.
        corruptions: how many evaluation images are corrupted, and a finished network measured on; 0: it is not.
        severities: of these corruptions.
        tested: pairs of rows whose differences were registered before the runs, and are tested together.
    """

    summary: str
    settings: dict[str, Any] = field(default_factory=dict)
    reduction: Reduction | None = None
    groups: int | None = None
    corruptions: int = 0
    severities: tuple[int, ...] = (1, 3, 5)
    tested: tuple[tuple[str, str], ...] = ()


_TWENTY_CLASSES = Reduction(classes=20, images=250, edge=16)
SCALES: dict[str, Scale] = {
    "full": Scale("the paper's setting"),
    "long": Scale(
        "10 minutes a run of plain training on a CPU core, on the images of medium, until it fits its own; more is "
        "measured of each network, see docs/STUDY.md",
        {
            "model": "wide_resnet16_2",
            "epochs": 100,
            "decay_milestones": [50, 75],
            "batch_size": 128,
            "padding": 2,
            "amp_dtype": "float32",
            "channels_last": True,
            "val_interval": 200,
            "threads": 1,
        },
        _TWENTY_CLASSES,
        corruptions=1000,
        tested=(
            ("apart-n1", "random-bn-n1"),
            ("apart-n1", "standard-2x"),
            ("apart", "ghost-bn"),
            ("apart", "standard-2x"),
            ("apart-n1", "apart"),
        ),
    ),
    "medium": Scale(
        "minutes a run on a CPU core with bfloat16 arithmetic of its own, hours on others: WRN-16-2 on 5,000 images of "
        "16 pixels in 20 classes",
        {
            "model": "wide_resnet16_2",
            "epochs": 60,
            "decay_milestones": [30, 45],
            "batch_size": 128,
            "padding": 2,
            "amp_dtype": "bfloat16",
            "channels_last": True,
            "val_interval": 10,
            "threads": 1,
        },
        _TWENTY_CLASSES,
    ),
    "small": Scale(
        "minutes a run on any CPU core: WRN-16-2 on 1,000 images of 16 pixels in 10 classes",
        {
            "model": "wide_resnet16_2",
            "epochs": 48,
            "decay_milestones": [24, 36],
            "batch_size": 64,
            "padding": 2,
            "amp_dtype": "float32",
            "channels_last": True,
            "val_interval": 48,
            "threads": 1,
        },
        Reduction(classes=10, images=100, edge=16),
        groups=8,
    ),
    "smoke": Scale(
        "seconds a run, on the bundled data or --data-dir, 4 steps whatever the budget: shows that it works",
        {
            "model": "test_resnet",
            "dataset": "demo",
            "epochs": 2,
            "decay_milestones": [1],
            "batch_size": 128,
            "max_steps": 4,
        },
    ),
}
