"""What a setting may be, by itself and beside the others, before names, data or the machine are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from timm.models import is_model, split_model_name_tag
from timm.optim import list_optimizers

from apart_hf.config.model_arguments import channels_of, check_model_arguments
from apart_hf.config.setting import Setting, settings_of
from apart_hf.data import find_dataset
from apart_hf.errors import ApartError, unknown_name
from apart_hf.strategies.methods import METHODS, check_hyper_parameters

if TYPE_CHECKING:
    from apart_hf.config.train_config import TrainConfig


_NO_PROJECT = (".", "..", "best", "checkpoints", "hub", "last", "plots")
FLOAT32 = 1.1754944e-38, 3.4028235e38  # smallest and largest: what training can compute with


def check_values(config: TrainConfig) -> None:
    """Raise ApartError for the first setting that is out of its range, or does not go with another."""
    for setting in settings_of(type(config)).values():
        value = getattr(config, setting.name)
        for number in value if isinstance(value, list) else [value]:
            _check_number(setting, number, value)
    _check_lists(config)
    _check_together(config)
    config.checkpoint_interval  # noqa: B018  raises where it cannot be read
    name = config.experiment
    if name is not None and (name == ".." or Path(name).name != name):
        raise ApartError(f"--experiment {name!r}: must be a plain folder name; its parent is --output.")
    _check_project(config.project)


def _check_project(name: str) -> None:
    """Raise for what is no name of a project in every tracker: tensorboard makes it a folder within the run's."""
    if not name or len(name) > 128 or not name.isprintable() or set(name) & set("/\\#?%:") or name in _NO_PROJECT:
        raise ApartError(
            f"--project {name!r}: must be a plain name of 1 to 128 characters without / \\ # ? % : and none of "
            f"{', '.join(_NO_PROJECT)}, which are a run's own folders."
        )


def _check_number(setting: Setting, number: Any, value: Any) -> None:
    """Check a setting's value, or one number of its list."""
    problem = None if number is None or setting.range is None else setting.range.problem(number)
    if problem is not None:
        is_hyper = any(setting.name in method.hyper_parameters() for method in METHODS.values())
        given = f"{setting.name}={value}" if is_hyper else f"{setting.flag} {value}"  # as `create_strategy` says it
        raise ApartError(f"{given}: {problem}.")
    size = abs(number) if isinstance(number, float) else 0.0
    if 0 < size < FLOAT32[0] or FLOAT32[1] < size < float("inf"):
        raise ApartError(
            f"{setting.flag} {number:g}: training computes in float32, which has numbers from 1.2e-38 to 3.4e38; take "
            "one of them."
        )


def _check_lists(config: TrainConfig) -> None:
    check_model_arguments(config)
    channels = channels_of(config)
    if config.input_size is not None:
        first, height, width = config.input_size
        if first != (channels or 3) or height != width or config.img_size not in (None, height):
            size = " ".join(map(str, config.input_size))
            raise ApartError(
                f"--input-size {size}: images here are square RGB, 3 N N, with N as in --img-size; grey ones are "
                "1 N N, with --in-chans 1."
            )
    for flag, values in (("--mean", config.mean), ("--std", config.std)):
        if values is not None and len(values) not in ((1, 3) if channels is None else (1, channels)):
            raise ApartError(
                f"{flag} {' '.join(map(str, values))}: needs one value, or one for each channel of the images "
                f"({channels or 3})."
            )


def _check_together(config: TrainConfig) -> None:
    if config.clip_grad == 0:
        raise ApartError("--clip-grad 0 would remove every gradient; leave the flag out to clip nothing.")
    if config.train_num_samples is not None and not config.streaming:
        raise ApartError("--train-num-samples is the length of a stream; add --streaming, or leave it out.")
    if config.val_fraction is not None and config.streaming:
        raise ApartError("--val-fraction needs the whole training split, which a stream is not; drop one flag.")
    if config.aa is not None and config.color_jitter:
        raise ApartError("--aa and --color-jitter exclude each other in timm; leave one of them out.")
    if (config.mixup or config.cutmix) and (config.batch_size or 2) % 2:
        raise ApartError(f"mixup and cutmix mix pairs; --batch-size {config.batch_size} is odd, take an even one.")


def check_names(config: TrainConfig) -> None:
    """Refuse what can be refused before any library is asked."""
    if config.method not in METHODS:
        raise unknown_name("method", config.method, METHODS)
    find_dataset(config.dataset, config.data_dir)
    if ":" not in config.model and not is_model(split_model_name_tag(config.model)[0]):
        raise unknown_name("model", config.model, timm.list_models())
    if config.opt not in list_optimizers():
        raise unknown_name("optimizer", config.opt, map(str, list_optimizers()))
    if config.opt == "adahessian":
        raise ApartError("--opt adahessian needs second derivatives, which the two passes do not give; choose another.")
    check_hyper_parameters(config.method, config.hyper_parameters())
    if config.epsilon_warmup_epochs and "epsilon" not in METHODS[config.method].hyper_parameters():
        raise ApartError(f"--epsilon-warmup-epochs: the method {config.method!r} has no epsilon; leave the flag out.")
    if config.trackers:
        _check_trackers(config.trackers)


def _check_trackers(trackers: list[str]) -> None:
    from accelerate.tracking import get_available_trackers  # a second and a half, which --help need not take
    from accelerate.utils import LoggerType

    for tracker in trackers:
        if tracker not in [known.value for known in LoggerType]:
            raise unknown_name("tracker", tracker, [known.value for known in LoggerType])
        if LoggerType(tracker) not in [*get_available_trackers(), LoggerType.ALL]:
            raise ApartError(f"--report-to {tracker}: not installed; pip install {tracker}, or drop the flag.")
