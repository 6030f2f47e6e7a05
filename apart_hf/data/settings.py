"""What is loaded, and how batches are made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Only = Literal["train", "val"]


@dataclass(frozen=True)
class DataSettings:
    """Says what to load, and which part of it for what.

    Args:
        dataset: a registered name or a Hub id.
        dataset_config: the Hub dataset's configuration; None: the registered one, or the only one.
        data_dir: a folder instead.
        train_split, val_split, input_key, target_key: names; None: found, see `load_image_data`.
        num_classes: to be checked against the data.
        class_map: file of class names, one a line, in the order of the class indices.
        val_fraction: share of the training split that is kept for validation; None: `val_split` is.
        seed: of that share.
        streaming: read images as they come.
        train_num_samples: images in the training split, of a stream that does not tell.
        skip_bad: images that cannot be decoded are no error.
        class_names: the classes that a model or a run records; the data are put in their order.
        class_order: the order of the classes, where the data have just these.
        only: load one split, to train on or to evaluate on, which is then both of `ImageData`; it may have some of
            `class_names` alone.
    """

    dataset: str = "demo"
    dataset_config: str | None = None
    data_dir: str | None = None
    train_split: str | None = None
    val_split: str | None = None
    input_key: str | None = None
    target_key: str | None = None
    num_classes: int | None = None
    class_map: str | None = None
    val_fraction: float | None = None
    seed: int = 0
    streaming: bool = False
    train_num_samples: int | None = None
    skip_bad: bool = False
    class_names: tuple[str, ...] | None = None
    class_order: tuple[str, ...] | None = None
    only: Only | None = None

    @property
    def named(self) -> dict[str, str]:
        """Return the names of splits and columns that were given."""
        names = {key: getattr(self, key) for key in ("train_split", "val_split", "input_key", "target_key")}
        return {key: name for key, name in names.items() if name is not None}


CHANNELS = (1, 3)  # of the images that are read: grey and RGB
LoaderKind = Literal["auto", "memory", "workers"]
OnBadImage = Literal["error", "skip"]


@dataclass(frozen=True)
class LoaderSettings:
    """Says how batches are made.

    Args:
        images: timm's description of the images, see `data_config`.
        batch_size, eval_batch_size: of one process.
        loader: "memory": images are decoded once; "workers": at every use; "auto": memory where that gives the same.
        workers: loader processes, of the second kind and of streams.
        seed: of order and augmentation.
        augmentation: arguments of `train_transform`, such as aa, color_jitter and reprob.
        repeats: how often each image of an epoch of training comes, see `RepeatedImages`; 0: once.
        skip_bad: pass over images that cannot be decoded.
        padding: pixels around small training images before their random crop; None: the dataset's.
        decoded_cache: keep decoded images on disk, for the next run, see `DecodedCache`.
        shuffle_buffer: images of a stream that each loader process shuffles among themselves.
    """

    images: dict[str, Any]
    batch_size: int
    eval_batch_size: int
    loader: LoaderKind = "auto"
    workers: int = 0
    seed: int = 0
    augmentation: dict[str, Any] | None = None
    skip_bad: bool = False
    shuffle_buffer: int = 2048
    padding: int | None = None
    repeats: float = 0.0
    decoded_cache: bool = False
