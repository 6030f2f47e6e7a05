"""How images become tensors: the paper's augmentation for small images, timm's transforms for large ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from PIL import Image as PIL
from PIL.Image import Image
from timm.data import create_transform, resolve_data_config, str_to_interp_mode
from timm.data.auto_augment import AugmentOp, posterize
from torch import Tensor
from torchvision import transforms as T

from apart_hf.errors import ApartError

_POLICY = re.compile(r"(rand|augmix|original|originalr|v0|v0r|3a)(-(m|n|p|w|t|d|b|mstd|mmax|inc)\d+(\.\d+)?)*")
ON_SINGLE_IMAGES = ("aa", "color_jitter", "reprob", "scale")  # arguments of `train_transform` that batches cannot have
SMALL = 96  # pixels; up to here images are cropped from a padded original instead of being resized
LONGEST = 32  # times the shorter edge; what is longer is cut before it is resized, which could take gigabytes


def data_config(
    pretrained_cfg: dict[str, Any],
    image_size: tuple[int, int],
    *,
    img_size: int | None = None,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    channels: int = 3,
) -> dict[str, Any]:
    """Make timm's description of the evaluation images: input_size, interpolation, mean, std, crop_pct, crop_mode.

    Of another number of channels than mean or std has, each gets the mean of these values, as in timm.

    Args:
        pretrained_cfg: the model's.
        image_size: (width, height) of the dataset's images, in pixels.
        img_size: edge of the network's input, in pixels; None: the images' shorter edge where they are small, else
            the model's own.
        mean, std: per channel; None: the model's.
        interpolation, crop_pct: of the evaluation images; None: the model's, and small images whole.
        channels: of the network's input.
    """
    small = max(image_size) <= SMALL
    fixed = pretrained_cfg.get("fixed_input_size")
    size = img_size or (min(image_size) if small and not fixed else pretrained_cfg["input_size"][-1])
    config = resolve_data_config({"input_size": (channels, size, size)}, pretrained_cfg=pretrained_cfg)
    if small:
        config["crop_pct"] = 1.0
    config |= {k: v for k, v in (("interpolation", interpolation), ("crop_pct", crop_pct)) if v is not None}
    normal = {"mean": config["mean"] if mean is None else mean, "std": config["std"] if std is None else std}
    return config | {key: _of_each(tuple(values), channels) for key, values in normal.items()}


def _of_each(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values if len(values) == channels else (math.fsum(values) / len(values),) * channels


class _Shortened:
    """Cuts an image that is more than so many times as long as wide to that, in its middle or anywhere by chance."""

    def __init__(self, times: int, anywhere: bool = False):
        self.times, self.anywhere = times, anywhere

    def __call__(self, image: Image) -> Image:
        width, height = image.size
        length, longest = max(width, height), self.times * min(width, height)
        if length <= longest:
            return image
        longest += (length - longest) % 2  # so that the middle stays the middle
        size = [min(height, longest), min(width, longest)]
        return T.RandomCrop(size)(image) if self.anywhere else T.functional.center_crop(image, size)


def grey_first(config: dict[str, Any]) -> list[Callable]:
    """Make the step that turns RGB to grey, of a network whose input has one channel; else none."""
    return [T.Grayscale()] if config["input_size"][0] == 1 else []


def train_transform(
    config: dict[str, Any],
    image_size: tuple[int, int],
    padding: int = 4,
    *,
    aa: str | None = None,
    color_jitter: float = 0.0,
    reprob: float = 0.0,
    remode: str = "pixel",
    recount: int = 1,
    scale: Sequence[float] | None = None,
    hflip: float = 0.5,
    vflip: float = 0.0,
    interpolation: str | None = None,
    no_aug: bool = False,
) -> Callable[[Image], Tensor]:
    """Pad, crop at random and flip small images (the paper's CIFAR setting); resize, crop and flip others as timm does.

    Args:
        config: timm's description of the images, see `data_config`.
        image_size: (width, height) of the dataset's images, in pixels.
        padding: pixels around a small image before its random crop.
        aa, color_jitter, reprob, remode, recount: timm's automatic augmentation, colour jitter and random erasing,
            after that.
        scale: shares of the image that timm's crop takes, also of small images; None: timm's own, of others alone.
        hflip, vflip: probabilities of the flips.
        no_aug: images are resized to the network's input, as timm does, and nothing else.
        interpolation: where images are resized, "random" in turn; None: that of `config`.

    Raises:
        ApartError: for a policy that timm does not know.
    """
    size = config["input_size"][-1]
    if aa is not None and not _POLICY.fullmatch(aa):  # timm passes over what it cannot read
        raise ApartError(f"--aa {aa!r} is no policy of timm; rand-m9-mstd0.5, augmix-m3-w3 and v0 are.")
    resizing = interpolation or config["interpolation"]
    shown = {"interpolation": resizing, "mean": config["mean"], "std": config["std"]}
    if no_aug:
        return create_transform(config["input_size"], is_training=True, no_aug=True, **shown)
    try:
        crop, augment, to_tensor = create_transform(
            config["input_size"],
            is_training=True,
            color_jitter=color_jitter,
            auto_augment=aa,
            scale=None if scale is None else (scale[0], scale[1]),
            hflip=hflip,
            vflip=vflip,
            re_prob=reprob,
            re_mode=remode,
            re_count=recount,
            separate=True,
            **shown,
        )
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise ApartError(f"--aa {aa!r} is no policy of timm; rand-m9-mstd0.5, augmix-m3-w3 and v0 are.") from error
    _keep_no_bits(augment)
    if max(image_size) <= SMALL and scale is None:
        # they do nothing to an image of that size
        modes = ("bilinear", "bicubic") if resizing == "random" else (resizing,)
        resize = T.RandomChoice([T.Resize(size, str_to_interp_mode(mode)) for mode in modes])
        cropped = T.RandomCrop(size, padding=padding)
        flips = [T.RandomHorizontalFlip(hflip), *([T.RandomVerticalFlip(vflip)] if vflip else [])]
        crop = T.Compose([_Shortened(LONGEST, anywhere=True), resize, cropped, *flips])
    return T.Compose([*grey_first(config), crop, augment, to_tensor])


def _keep_no_bits(augment: Any) -> None:
    """Let timm's policies posterize to 0 bits, which is black, also where Pillow (13) takes no such number."""
    if isinstance(augment, AugmentOp):
        if augment.aug_fn is posterize:
            augment.aug_fn = _posterize
        return
    for name in ("transforms", "ops", "policy"):
        augment = getattr(augment, name, augment)
    for inner in augment if isinstance(augment, list) else ():
        _keep_no_bits(inner)


def _posterize(image: Image, bits: int, **more: Any) -> Image:
    return posterize(image, bits, **more) if bits > 0 else PIL.new(image.mode, image.size)


def eval_transform(config: dict[str, Any]) -> Callable[[Image], Tensor]:
    """Make the transform that `timm.data.create_transform` makes of the exported config, of RGB images.

    Before it, an image that is more than `LONGEST` times as long as wide is cut to that, in the middle: of its ends
    timm's centre crop shows nothing. timm's crop mode "border", which shows the whole image, fails where nothing is
    left of the width, so the image is cut to a width of one pixel; "squash" takes any image.
    """
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    exported = create_transform(**{key: config[key] for key in keys}, is_training=False)
    times = {"squash": None, "border": min(config["input_size"][1:])}.get(config["crop_mode"], LONGEST)
    shortened = [] if times is None else [_Shortened(times)]
    return T.Compose([*grey_first(config), *shortened, *exported.transforms])
