"""How images become tensors: the paper's augmentation for small images, timm's transforms for large ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from PIL.Image import Image
from timm.data import create_transform, resolve_data_config, str_to_interp_mode
from torch import Tensor
from torchvision import transforms as T

from apart_hf.errors import ApartError

_POLICY = re.compile(r"(rand|augmix|original|originalr|v0|v0r|3a)(-(m|n|p|w|t|d|b|mstd|mmax|inc)\d+(\.\d+)?)*")
SMALL = 96  # pixels; up to here images are cropped from a padded original instead of being resized


def data_config(
    pretrained_cfg: dict[str, Any],
    image_size: tuple[int, int],
    *,
    img_size: int | None = None,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
) -> dict[str, Any]:
    """Make timm's description of the evaluation images: input_size, interpolation, mean, std, crop_pct, crop_mode.

    Args:
        pretrained_cfg: the model's.
        image_size: (width, height) of the dataset's images, in pixels.
        img_size: edge of the network's input, in pixels; None: the images' shorter edge where they are small, else
            the model's own.
        mean, std: per channel; None: the model's.
        interpolation, crop_pct: of the evaluation images; None: the model's, and small images whole.
    """
    small = max(image_size) <= SMALL
    fixed = pretrained_cfg.get("fixed_input_size")
    size = img_size or (min(image_size) if small and not fixed else pretrained_cfg["input_size"][-1])
    config = resolve_data_config({"input_size": (3, size, size)}, pretrained_cfg=pretrained_cfg)
    if small:
        config["crop_pct"] = 1.0
    config |= {k: v for k, v in (("interpolation", interpolation), ("crop_pct", crop_pct)) if v is not None}
    return config | {key: tuple(value) for key, value in (("mean", mean), ("std", std)) if value is not None}


def train_transform(
    config: dict[str, Any],
    image_size: tuple[int, int],
    padding: int = 4,
    *,
    aa: str | None = None,
    color_jitter: float = 0.0,
    reprob: float = 0.0,
    interpolation: str | None = None,
) -> Callable[[Image], Tensor]:
    """Pad, crop at random and flip small images (the paper's CIFAR setting); resize, crop and flip others as timm does.

    Args:
        config: timm's description of the images, see `data_config`.
        image_size: (width, height) of the dataset's images, in pixels.
        padding: pixels around a small image before its random crop.
        aa, color_jitter, reprob: timm's automatic augmentation, colour jitter and random erasing, after that.
        interpolation: where images are resized, "random" in turn; None: that of `config`.

    Raises:
        ApartError: for a policy that timm does not know.
    """
    size = config["input_size"][-1]
    if aa is not None and not _POLICY.fullmatch(aa):  # timm passes over what it cannot read
        raise ApartError(f"--aa {aa!r} is no policy of timm; rand-m9-mstd0.5, augmix-m3-w3 and v0 are.")
    resizing = interpolation or config["interpolation"]
    try:
        crop, augment, to_tensor = create_transform(
            config["input_size"],
            is_training=True,
            color_jitter=color_jitter,
            auto_augment=aa,
            re_prob=reprob,
            re_mode="pixel",
            interpolation=resizing,
            mean=config["mean"],
            std=config["std"],
            separate=True,
        )
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise ApartError(f"--aa {aa!r} is no policy of timm; rand-m9-mstd0.5, augmix-m3-w3 and v0 are.") from error
    if max(image_size) <= SMALL:
        # they do nothing to an image of that size
        modes = ("bilinear", "bicubic") if resizing == "random" else (resizing,)
        resize = T.RandomChoice([T.Resize(size, str_to_interp_mode(mode)) for mode in modes])
        crop = T.Compose([resize, T.RandomCrop(size, padding=padding), T.RandomHorizontalFlip()])
    return T.Compose([crop, augment, to_tensor])


def eval_transform(config: dict[str, Any]) -> Callable[[Image], Tensor]:
    """Make the transform that `timm.data.create_transform` makes of the exported config."""
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_transform(**{key: config[key] for key in keys}, is_training=False)
