"""What a setting may be, by itself and beside the others, before names, data or the machine are looked at."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from timm.models import is_model, split_model_name_tag
from timm.optim import list_optimizers

from apart_hf.data import find_dataset
from apart_hf.errors import ApartError, unknown_name
from apart_hf.strategies.methods import METHODS, check_hyper_parameters

if TYPE_CHECKING:
    from apart_hf.config.train_config import TrainConfig


FLOAT32 = 1.1754944e-38, 3.4028235e38  # smallest and largest: what training can compute with
_LEAST = {
    0: (
        "lr",
        "momentum",
        "weight_decay",
        "warmup_epochs",
        "clip_grad",
        "mixup",
        "smoothing",
        "workers",
        "seed",
        "cutmix",
        "color_jitter",
        "reprob",
        "drop",
        "drop_path",
        "model_ema_decay",
        "min_lr",
        "warmup_lr",
        "lr_base",
        "padding",
    ),
    1: (
        "epochs",
        "max_steps",
        "batch_size",
        "threads",
        "img_size",
        "log_interval",
        "every",
        "grad_accum_steps",
        "expect_processes",
        "validation_batch_size",
        "shuffle_buffer",
        "train_num_samples",
        "lr_base_size",
        "checkpoint_hist",
        "val_interval",
    ),
}
_MOST = {"seed": 2**32 - 2, "workers": 256, "threads": 1024}
_ANY = 2**31 - 1
_BELOW_1 = {"smoothing": 0.1, "drop": 0.2, "drop_path": 0.1, "model_ema_decay": 0.9998}  # and what is common


def check_values(config: TrainConfig) -> None:
    """Raise ApartError for the first setting that is out of its range, or does not go with another."""
    for least, names in _LEAST.items():
        for name in names:
            _check_range(_flag(name), getattr(config, name), least, _MOST.get(name, _ANY))
    for name, value in vars(config).items():
        for number in value if isinstance(value, list) else [value]:
            _check_float32(_flag(name), number)
    _check_shares(config)
    _check_lists(config)
    _check_together(config)
    config.checkpoint_interval  # noqa: B018  raises where it cannot be read
    name = config.experiment
    if name is not None and (name == ".." or Path(name).name != name):
        raise ApartError(f"--experiment {name!r}: must be a plain folder name; its parent is --output.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_range(flag: str, value: float | None, least: int, most: int) -> None:
    if value is not None and not least <= value < float("inf"):  # NaN is refused too
        raise ApartError(f"{flag} {value}: must be a finite number of at least {least}.")
    if isinstance(value, int) and value > most:
        raise ApartError(f"{flag} {value}: must be at most {most}.")


def _check_float32(flag: str, number: Any) -> None:
    size = abs(number) if isinstance(number, float) else 0.0
    if 0 < size < FLOAT32[0] or FLOAT32[1] < size < float("inf"):
        raise ApartError(
            f"{flag} {number:g}: training computes in float32, which has numbers from 1.2e-38 to 3.4e38; take one of "
            "them."
        )


def _check_shares(config: TrainConfig) -> None:
    if config.ratio is not None and not 0 < config.ratio <= 1:
        raise ApartError(f"ratio={config.ratio}: N/M, the share of the batch in the second pass, is in (0, 1].")
    if config.budget is not None and not 0 < config.budget < float("inf"):
        raise ApartError(f"--budget {config.budget}: must be a finite number above 0.")
    if config.clip_grad == 0:
        raise ApartError("--clip-grad 0 would remove every gradient; leave the flag out to clip nothing.")
    for name, common in _BELOW_1.items():
        if getattr(config, name) >= 1:
            raise ApartError(f"{_flag(name)} {getattr(config, name)}: must be below 1 ({common} is common).")
    if config.val_fraction is not None and not 0 < config.val_fraction < 1:
        raise ApartError(f"--val-fraction {config.val_fraction}: a share between 0 and 1 (0.1 is common).")
    if config.crop_pct is not None and not 0 < config.crop_pct <= 1:
        raise ApartError(f"--crop-pct {config.crop_pct}: a share of the edge, above 0 and at most 1.")
    if config.reprob > 1:
        raise ApartError(f"--reprob {config.reprob}: a probability is at most 1 (0.25 is common).")


def _check_lists(config: TrainConfig) -> None:
    if any(not 1 <= milestone < 2**31 for milestone in config.decay_milestones or ()):
        raise ApartError(f"--decay-milestones {config.decay_milestones}: epochs are counted from 1.")
    if not all(math.isfinite(value) for value in config.mean or ()):
        raise ApartError(f"--mean {config.mean}: must be finite numbers.")
    if any(not 0 < value < float("inf") for value in config.std or ()):
        raise ApartError(f"--std {config.std}: must be finite numbers above 0.")
    if config.input_size is not None:
        channels, height, width = config.input_size
        if channels != 3 or height != width or config.img_size not in (None, height):
            size = " ".join(map(str, config.input_size))
            raise ApartError(f"--input-size {size}: images here are square RGB, 3 N N, with N as in --img-size.")
    for pair in config.model_kwargs or ():
        if not pair.partition("=")[0].isidentifier() or "=" not in pair:
            raise ApartError(f"--model-kwargs {pair!r}: needs KEY=VALUE, for instance drop_block_rate=0.1.")


def _check_together(config: TrainConfig) -> None:
    if config.train_num_samples is not None and not config.streaming:
        raise ApartError("--train-num-samples is the length of a stream; add --streaming, or leave it out.")
    if config.val_fraction is not None and config.streaming:
        raise ApartError("--val-fraction needs the whole training split, which a stream is not; drop one flag.")
    if config.aa is not None and config.color_jitter:
        raise ApartError("--aa and --color-jitter exclude each other in timm; leave one of them out.")
    if (config.mixup or config.cutmix) and (config.batch_size or 2) % 2:
        raise ApartError(f"mixup and cutmix mix pairs; --batch-size {config.batch_size} is odd, take an even one.")


def check_names(config: TrainConfig) -> None:
    """What can be refused before any library is asked."""
    if config.method not in METHODS:
        raise unknown_name("method", config.method, METHODS)
    find_dataset(config.dataset, config.data_dir)
    if ":" not in config.model and not is_model(split_model_name_tag(config.model)[0]):
        raise unknown_name("model", config.model, timm.list_models())
    if config.opt not in list_optimizers():
        raise unknown_name("optimizer", config.opt, list_optimizers())
    if config.opt == "adahessian":
        raise ApartError("--opt adahessian needs second derivatives, which the two passes do not give; choose another.")
    check_hyper_parameters(config.method, config.hyper_parameters())
    if config.report_to:
        _check_trackers(config.report_to)


def _check_trackers(trackers: list[str]) -> None:
    from accelerate.tracking import get_available_trackers  # a second and a half, which --help need not take
    from accelerate.utils import LoggerType

    for tracker in trackers:
        if tracker not in [known.value for known in LoggerType]:
            raise unknown_name("tracker", tracker, [known.value for known in LoggerType])
        if LoggerType(tracker) not in [*get_available_trackers(), LoggerType.ALL]:
            raise ApartError(f"--report-to {tracker}: not installed; pip install {tracker}, or drop the flag.")
