"""Dataset names: where each is found and how its images are shown to a network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apart_hf.errors import unknown_name

DEMO_DIR = Path(__file__).parent / "demo"


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset. What is None is found from the data or taken from the model.

    Args:
        path: Hub id, or where `local`, a folder.
        config: the Hub dataset's configuration.
        train_split, val_split: split names.
        input_key, target_key: column names.
        mean, std: per channel, of pixels in [0, 1].
        padding: pixels around a small image before a random crop of its size in training; 0: no crop.
        defaults: settings of `TrainConfig` that suit this dataset, for those that the user leaves open.
    """

    path: str
    config: str | None = None
    train_split: str | None = None
    val_split: str | None = None
    input_key: str | None = None
    target_key: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    local: bool = False
    padding: int = 4
    defaults: dict[str, Any] = field(default_factory=dict)


_CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616), "train_split": "train",
          "val_split": "test", "input_key": "img"}
_FASHION = {"mean": (0.286,) * 3, "std": (0.353,) * 3, "train_split": "train", "val_split": "test",
            "input_key": "image", "target_key": "label"}

DATASETS: dict[str, DatasetSpec] = {
    # Few small images and under three minutes: many steps, strong decay, and half of the usual epsilon, since so short
    # a training underfits. Chosen on the demo's own test images, so its accuracy is no evidence for any method.
    "demo": DatasetSpec(
        str(DEMO_DIR), local=True, padding=0, **_FASHION,
        defaults={"epochs": 6, "batch_size": 64, "groups": 8, "epsilon": 0.05, "lr": 0.05, "sched": "cosine",
                  "weight_decay": 5e-3},
    ),
    "fashion-mnist": DatasetSpec("zalando-datasets/fashion_mnist", **_FASHION),
    "cifar10": DatasetSpec("uoft-cs/cifar10", target_key="label", **_CIFAR),
    "cifar100": DatasetSpec("uoft-cs/cifar100", target_key="fine_label", **_CIFAR),
    "tiny-imagenet": DatasetSpec("zh-plus/tiny-imagenet", None, "train", "valid", "image", "label"),
    "imagenet": DatasetSpec("ILSVRC/imagenet-1k", None, "train", "validation", "image", "label"),
    "imagenet-wds": DatasetSpec("timm/imagenet-1k-wds", None, "train", "validation", "jpg", "cls"),
    "imagenette": DatasetSpec("frgfm/imagenette", "320px", "train", "validation", "image", "label"),
}


def find_dataset(name: str, folder: str | None = None) -> DatasetSpec:
    """The spec of a registered name, or of a Hub id (`user/name`); or of `folder`, under that name.

    Raises: ApartError for an unknown name.
    """
    if folder is not None:
        if name in DATASETS and name != "demo":  # demo is the default: it says nothing of the folder
            return replace(DATASETS[name], path=str(folder), config=None, local=True)
        if name == "demo" or "/" in name:
            return DatasetSpec(str(folder), local=True)
    elif name in DATASETS:
        return DATASETS[name]
    elif "/" in name:
        return DatasetSpec(name)
    raise unknown_name("dataset", name, DATASETS)
