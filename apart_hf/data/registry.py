"""Dataset names: where each is found and how its images are shown to a network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from apart_hf.data.dataset_names import without_prefix
from apart_hf.errors import unknown_name

DEMO_DIR = Path(__file__).parent / "demo"


@dataclass(frozen=True)
class DatasetSpec:
    """Describes one dataset. What is None is found from the data or taken from the model.

    Args:
        path: Hub id, or where `local`, a folder.
        config: the Hub dataset's configuration.
        train_split, val_split: split names.
        input_key, target_key: column names.
        mean, std: per channel, of pixels in [0, 1].
        padding: pixels around a small image before a random crop of its size in training; 0: no crop.
        source: Hub id that a local set is a part of.
        num_classes: how many there are.
        image_size: edge in pixels of the images, or of what is usually cut from them.
        train_size, val_size: images in the two splits.
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
    source: str | None = None
    padding: int = 4
    num_classes: int | None = None
    image_size: int | None = None
    train_size: int | None = None
    val_size: int | None = None
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def hub_id(self) -> str | None:
        """Return the Hub's name of the dataset that these images are from."""
        return self.source if self.local else self.path


_CIFAR = partial(
    DatasetSpec,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2471, 0.2435, 0.2616),
    train_split="train",
    val_split="test",
    input_key="img",
    image_size=32,
    train_size=50_000,
    val_size=10_000,
)
_FASHION = partial(
    DatasetSpec,
    mean=(0.286, 0.286, 0.286),
    std=(0.353, 0.353, 0.353),
    train_split="train",
    val_split="test",
    input_key="image",
    target_key="label",
    num_classes=10,
    image_size=28,
)
# normalised as the model is: timm's usual mean and std of ImageNet
_NATURAL = partial(DatasetSpec, train_split="train", val_split="validation", input_key="image", target_key="label")
_IMAGENET = partial(_NATURAL, num_classes=1000, image_size=224, train_size=1_281_167, val_size=50_000)
DATASETS: dict[str, DatasetSpec] = {
    # Few small images and under three minutes: many steps, strong decay, and half of the usual epsilon, since so short
    # a training underfits. Chosen on the demo's own test images, so its accuracy is no evidence for any method.
    "demo": _FASHION(
        str(DEMO_DIR),
        local=True,
        source="zalando-datasets/fashion_mnist",
        padding=0,
        train_size=6_000,
        val_size=1_000,
        defaults={
            "epochs": 6,
            "batch_size": 64,
            "groups": 8,
            "epsilon": 0.05,
            "lr": 0.05,
            "sched": "cosine",
            "weight_decay": 5e-3,
        },
    ),
    "fashion-mnist": _FASHION("zalando-datasets/fashion_mnist", train_size=60_000, val_size=10_000),
    "cifar10": _CIFAR("uoft-cs/cifar10", target_key="label", num_classes=10),
    "cifar100": _CIFAR("uoft-cs/cifar100", target_key="fine_label", num_classes=100),
    "tiny-imagenet": _NATURAL(
        "zh-plus/tiny-imagenet", val_split="valid", num_classes=200, image_size=64, train_size=100_000, val_size=10_000
    ),
    "imagenet": _IMAGENET("ILSVRC/imagenet-1k"),
    "imagenet-wds": _IMAGENET("timm/imagenet-1k-wds", input_key="jpg", target_key="cls"),
    "imagenette": _NATURAL(
        "frgfm/imagenette", "320px", num_classes=10, image_size=224, train_size=9_469, val_size=3_925
    ),
}


def registered(name: str, folder: str | None = None) -> DatasetSpec | None:
    """Return the registered dataset that a name stands for; beside a folder "demo", the default, stands for none."""
    return None if folder is not None and name == "demo" else DATASETS.get(name)


def find_dataset(name: str, folder: str | None = None) -> DatasetSpec:
    """Return the spec of a registered name, or of a Hub id (`user/name`, `hfds/user/name`); or of `folder`, under it.

    Raises:
        ApartError: for an unknown name, and for a kind of dataset that timm reads and we do not.
    """
    name = without_prefix(name)
    known = registered(name, folder)
    if known is not None:
        return (
            known if folder is None else replace(known, path=str(folder), config=None, local=True, source=known.hub_id)
        )
    if name in DATASETS or "/" in name:
        return DatasetSpec(name) if folder is None else DatasetSpec(str(folder), local=True)
    raise unknown_name("dataset", name, DATASETS, "Datasets of the Hub are named user/name.")
