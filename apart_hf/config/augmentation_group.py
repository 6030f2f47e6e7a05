"""Settings of what is done to training images and their labels, which is timm's, and of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from apart_hf.config.setting import setting

_setting = partial(setting, group="augmentation")
_probability = partial(_setting, role="what", least=0, most=1)


@dataclass(frozen=True)
class AugmentationGroup:
    """Says how training images are varied and mixed, and what is compared with the output."""

    no_aug: bool = _setting(
        False,
        "show training images as they are, whatever --scale, the flips, --aa, --color-jitter and --reprob say",
        role="what",
        recorded=48,
    )
    scale: list[float] | None = _setting(
        None,
        "smallest and largest share of an image that timm's random crop takes [0.08 1.0; small images: they are "
        "padded and cropped]",
        role="what",
        above=0,
        most=1,
        over="a share of the image is at most 1 (0.08 1.0 is common)",
        length=2,
        recorded=49,
    )
    hflip: float = _probability(
        0.5, "probability of a horizontal flip", over="a probability is at most 1 (0.5 is common)", recorded=50
    )
    vflip: float = _probability(
        0.0, "probability of a vertical flip", over="a probability is at most 1 (0.5 is common)", recorded=51
    )
    train_interpolation: Literal["bilinear", "bicubic", "nearest", "random"] | None = _setting(
        None, "how training images are resized [--interpolation]", role="what", recorded=52
    )
    aa: str | None = _setting(
        None,
        "timm's automatic augmentation, for instance rand-m9-mstd0.5 [off]",
        role="what",
        recorded=19,
        metavar="POLICY",
    )
    color_jitter: float = _setting(0.0, "colour jitter; not with --aa", role="what", least=0, recorded=20)
    aug_repeats: float = _setting(
        0.0,
        "show each image so often in an epoch, in other augmentations, and so many fewer images; 0: off",
        role="what",
        least=0,
        recorded=53,
    )
    reprob: float = _probability(
        0.0, "probability of random erasing", over="a probability is at most 1 (0.25 is common)", recorded=21
    )
    remode: Literal["pixel", "rand", "const"] = _setting(
        "pixel",
        "what is put where it erases; pixel: noise; rand: one colour; const: the mean",
        role="what",
        recorded=54,
    )
    recount: int = _setting(1, "most rectangles that it erases in an image", role="what", least=1, recorded=55)
    mixup: float = _setting(0.0, "mixup alpha; 0: off", role="what", least=0, recorded=16)
    cutmix: float = _setting(
        0.0, "cutmix alpha; 0: off. With --mixup: one or the other, batch by batch", role="what", least=0, recorded=17
    )
    mixup_prob: float = _probability(
        1.0,
        "probability that a batch is mixed, by --mixup or --cutmix",
        over="a probability is at most 1 (1 is common)",
        recorded=56,
    )
    mixup_switch_prob: float = _probability(
        0.5,
        "probability of cutmix rather than mixup, where both are on",
        over="a probability is at most 1 (0.5 is common)",
        recorded=57,
    )
    mixup_mode: Literal["batch", "pair", "elem"] = _setting(
        "batch", "what is mixed by one draw: a batch, a pair of images, or an image", role="what", recorded=58
    )
    mixup_off_epoch: int = _setting(
        0, "mix in so many first epochs alone; 0: in all", role="what", least=0, recorded=59
    )
    smoothing: float = _setting(
        0.0,
        "label smoothing in [0, 1)",
        role="what",
        least=0,
        below=1,
        over="must be below 1 (0.1 is common)",
        recorded=18,
    )
    bce_loss: bool = _setting(
        False, "binary cross-entropy of each class, in the place of cross-entropy", role="what", recorded=60
    )
