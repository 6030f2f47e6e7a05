"""What a setting may be, by itself and beside the others, before names, data or the machine are looked at."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from timm.models import is_model, split_model_name_tag
from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers

from apart_hf.config.contradictions import check_in_use, check_together
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
    check_together(config)
    config.checkpoint_interval  # noqa: B018  raises where it cannot be read
    config.time_limit_seconds  # noqa: B018  likewise
    name = config.experiment
    if name is not None and (name == ".." or Path(name).name != name):
        raise ApartError(f"--experiment {name!r}: must be a plain folder name; its parent is --output.")
    _check_project("--project", config.project)
    if config.wandb_project is not None:
        _check_project("--wandb-project", config.wandb_project)


def _check_project(flag: str, name: str) -> None:
    """Raise for what is no name of a project in every tracker: tensorboard makes it a folder within the run's."""
    if not name or len(name) > 128 or not name.isprintable() or set(name) & set("/\\#?%:") or name in _NO_PROJECT:
        raise ApartError(
            f"{flag} {name!r}: must be a plain name of 1 to 128 characters without / \\ # ? % : and none of "
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


def check_names(config: TrainConfig) -> None:
    """Refuse what can be refused before any library is asked."""
    if config.method not in METHODS:
        raise unknown_name("method", config.method, METHODS)
    find_dataset(config.dataset, config.data_dir)
    if ":" not in config.model and not is_model(split_model_name_tag(config.model)[0]):
        raise unknown_name("model", config.model, timm.list_models())
    _check_optimizer(config)
    check_hyper_parameters(config.method, config.hyper_parameters())
    if config.epsilon_warmup_epochs and "epsilon" not in METHODS[config.method].hyper_parameters():
        raise ApartError(f"--epsilon-warmup-epochs: the method {config.method!r} has no epsilon; leave the flag out.")
    _check_rho_min(config)
    if config.perturb_from_epoch != 1 and not METHODS[config.method].perturbations:
        raise ApartError(
            f"--perturb-from-epoch: the method {config.method!r} has no second pass; leave the flag out, or choose "
            "another --method."
        )
    check_in_use(config)
    if config.trackers:
        _check_trackers(config.trackers)


def _check_rho_min(config: TrainConfig) -> None:
    """Refuse a schedule of rho that cannot be."""
    if config.rho_min is None:
        return
    known = METHODS[config.method].hyper_parameters()
    if "rho" not in known:
        raise ApartError(f"--rho-min: the method {config.method!r} has no rho; leave the flag out.")
    rho = known["rho"] if config.rho is None else config.rho
    if config.rho_min > rho:
        raise ApartError(
            f"--rho-min {config.rho_min:g} is above --rho {rho:g}, from which it falls; take a smaller one."
        )
    if config.sched == "none":
        raise ApartError("--rho-min lets rho follow the learning rate, and --sched none has it stay; leave one out.")


def _check_optimizer(config: TrainConfig) -> None:
    if config.opt not in list_optimizers():
        raise unknown_name("optimizer", config.opt, map(str, list_optimizers()))
    if config.opt == "adahessian":
        raise ApartError("--opt adahessian needs second derivatives, which the two passes do not give; choose another.")
    known = get_optimizer_info(config.opt)
    for flag, value, there in (
        ("--opt-eps", config.opt_eps, known.has_eps),
        ("--opt-betas", config.opt_betas, known.has_betas),
    ):
        if value is not None and not there:  # timm drops it
            raise ApartError(f"{flag}: the optimizer {config.opt!r} has none; leave the flag out.")
    usual = None if config.opt_betas is None else _usual_betas(config.opt)
    if config.opt_betas is not None and usual is not None and len(usual) != len(config.opt_betas):
        raise ApartError(
            f"--opt-betas {' '.join(map(str, config.opt_betas))}: the optimizer {config.opt!r} has {len(usual)}, "
            f"{' '.join(map(str, usual))} unless given."
        )


def _usual_betas(name: str) -> tuple[float, ...] | None:
    """Return the betas that an optimizer has unless they are given; None: it does not say, or is not installed."""
    try:
        made = get_optimizer_class(name, bind_defaults=False)
    except (AssertionError, ImportError):  # which making it says
        return None
    usual = getattr(inspect.signature(made).parameters.get("betas"), "default", None)
    return usual if isinstance(usual, tuple) else None


def _check_trackers(trackers: list[str]) -> None:
    from accelerate.tracking import get_available_trackers  # a second and a half, which --help need not take
    from accelerate.utils import LoggerType

    for tracker in trackers:
        if tracker not in [known.value for known in LoggerType]:
            raise unknown_name("tracker", tracker, [known.value for known in LoggerType])
        if LoggerType(tracker) not in [*get_available_trackers(), LoggerType.ALL]:
            raise ApartError(f"--report-to {tracker}: not installed; pip install {tracker}, or drop the flag.")
