"""Settings of the data: where images are found, how they are read, and of which size and scale they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from apart_hf.config.setting import setting
from apart_hf.data import DATASETS, LoaderKind, OnBadImage

_setting = partial(setting, group="data")


@dataclass(frozen=True)
class DataGroup:
    """Says what is trained and evaluated on."""

    dataset: str = _setting(
        "demo",
        f"{', '.join(DATASETS)}, or a Hub id user/name; demo is a small part of Fashion-MNIST",
        role="what",
        in_tables=False,
        metavar="NAME",
    )
    dataset_config: str | None = _setting(
        None, "configuration of a Hub dataset [its only one]", role="what", in_tables=False, metavar="NAME"
    )
    # where the images are; that they are the same is told by their digest
    data_dir: str | None = _setting(
        None,
        "local folder instead: parquet files, a folder of images a class, or save_to_disk",
        role="where",
        in_tables=False,
        metavar="DIR",
    )
    train_split: str | None = _setting(None, "split to train on [found]", role="what", metavar="NAME")
    val_split: str | None = _setting(None, "split to evaluate on [found]", role="what", metavar="NAME")
    val_fraction: float | None = _setting(
        None,
        "keep this share of each class of the training split for the evaluation after every epoch; "
        "--val-split is looked at once, at the end [off]",
        role="what",
        above=0,
        below=1,
        outside="a share between 0 and 1 (0.1 is common)",
        recorded=32,
        in_tables=False,
    )
    streaming: bool = _setting(False, "read images as they come, without a copy on disk", role="what", in_tables=False)
    # these two are the order and the length of an epoch
    shuffle_buffer: int = _setting(
        2048, "images that a loader process shuffles, with --streaming", role="what", least=1
    )
    train_num_samples: int | None = _setting(
        None, "images in the training split, with --streaming [found]", role="what", least=1
    )
    on_bad_image: OnBadImage = _setting(
        "error",
        "what to do with an image that cannot be decoded; skip: train on another one, evaluate "
        "without it, and count it",
        role="what",
        in_tables=False,
    )
    input_key: str | None = _setting(None, "column of the images [found]", role="what", metavar="NAME")
    target_key: str | None = _setting(None, "column of the class indices [found]", role="what", metavar="NAME")
    num_classes: int | None = _setting(None, "checked against the data [found]", role="what", on_resume="fixed")
    class_map: str | None = _setting(
        None, "file of class names, one a line, in the order of their indices [the data's]", role="what", metavar="FILE"
    )
    img_size: int | None = _setting(
        None,
        "input edge in pixels [small images: their own; else: the model's]",
        role="what",
        least=1,
        recorded=29,
        decides="input_size",
    )
    input_size: list[int] | None = _setting(
        None, "the same as timm writes it: 3 224 224", role="what", decides="img_size", length=3
    )
    in_chans: int | None = _setting(
        None,
        "channels of the images: 1 of grey ones, 3 of RGB [the model's]",
        role="what",
        on_resume="fixed",
        in_tables=False,
        least=1,
        most=3,
        outside="images are read with 1 channel (grey) or 3 (RGB) only; take 1 or 3",
        recorded=33,
    )
    loader: LoaderKind = _setting(
        "auto",
        "memory: small images are decoded once and augmented by the batch; workers: one by one, by "
        "loader processes; auto: memory where it gives the same",
        role="how",
    )
    no_decoded_cache: bool = _setting(
        False,
        "do not keep the decoded images of --loader memory on disk, in the cache of datasets, for the next run",
        role="how",
        on_resume="free",
    )
    workers: int | None = _setting(
        None,
        "loader processes [0 on the CPU; else one a core, at most 8]",
        role="how",
        on_resume="free",
        least=0,
        most=256,
        flags=("-j",),
    )
    padding: int | None = _setting(
        None,
        "black pixels around a small image before its random crop in training; 0: no crop [4; demo: 0]",
        role="what",
        least=0,
        recorded=30,
    )
    interpolation: Literal["bilinear", "bicubic", "nearest", "random"] | None = _setting(
        None, "how images are resized; random: in training, bilinear or bicubic by chance [the model's]", role="what"
    )
    crop_pct: float | None = _setting(
        None,
        "share of the resized edge that evaluation sees [the model's]",
        role="what",
        above=0,
        most=1,
        outside="a share of the edge, above 0 and at most 1",
    )
    mean: list[float] | None = _setting(
        None,
        "of each channel, in [0, 1], or one for all [the dataset's or the model's]",
        role="what",
        outside="must be finite numbers",
    )
    std: list[float] | None = _setting(None, "likewise", role="what", above=0, outside="must be finite numbers above 0")
