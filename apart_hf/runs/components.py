"""What a run is made of, from its settings: data settings, loader settings, optimizer, scheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from apart_hf.config.key_values import key_values
from apart_hf.config.passes import plain_epochs_of
from apart_hf.config.schedule import schedule_arguments
from apart_hf.config.train_config import FilledConfig, TrainConfig
from apart_hf.data import DataSettings, LoaderSettings
from apart_hf.errors import ApartError, first_line
from apart_hf.training.progress import learning_rate

AUGMENTATION = ("aa", "color_jitter", "reprob", "remode", "recount", "scale", "hflip", "vflip", "no_aug")


def make_optimizer(config: FilledConfig, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Make timm's optimizer, with weight decay on every parameter, BN and biases included, as in the paper."""
    given = {"eps": config.opt_eps, "betas": config.opt_betas} | key_values(config.opt_kwargs)
    own: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    try:
        return create_optimizer_v2(
            model,
            opt=config.opt,
            lr=lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            filter_bias_and_bn=False,
            layer_decay=config.layer_decay,
            **own,
        )
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ApartError(f"cannot create optimizer {config.opt!r}: {first_line(error)}.") from error


def make_scheduler(config: FilledConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler | None:
    """Make timm's scheduler, see `schedule_arguments`."""
    return create_scheduler_v2(optimizer, **schedule_arguments(config, steps_per_epoch))[0]


def make_hyper_schedule(
    config: FilledConfig, hyper: Mapping[str, Any], steps_per_epoch: int, optimizer: Any, lr: float
) -> Callable[[int], dict[str, float]] | None:
    """Make the schedule of the method's hyper-parameters.

    Epsilon rises from 0 over its warmup, in a straight line, which begins with the first epoch that has second passes.
    Rho is rho_min + (rho - rho_min) (lr_now - min_lr) / (lr - min_lr) (Zhuang et al. 2022, Algorithm 1, step 0), and
    never beyond these two.

    Args:
        config: of the run.
        hyper: of the method.
        steps_per_epoch: optimizer steps.
        optimizer: whose learning rate of the step to come is already set.
        lr: the highest learning rate.

    Returns:
        What gives the hyper-parameters after so many optimizer steps; None: they stay as they are.
    """
    warmup = config.epsilon_warmup_epochs * steps_per_epoch
    least = config.rho_min
    if not warmup and least is None:
        return None
    plain, fall = plain_epochs_of(config) * steps_per_epoch, lr - config.min_lr

    def schedule(steps: int) -> dict[str, float]:
        values = {"epsilon": hyper["epsilon"] * min(1.0, max(0, steps - plain) / warmup)} if warmup else {}
        if least is not None:
            share = (learning_rate(optimizer) - config.min_lr) / fall if fall > 0 else 1.0
            values["rho"] = least + (hyper["rho"] - least) * min(1.0, max(0.0, share))
        return values

    return schedule


def data_settings(config: TrainConfig) -> DataSettings:
    names = [field.name for field in dataclasses.fields(DataSettings) if hasattr(config, field.name)]
    return DataSettings(**{name: getattr(config, name) for name in names}, skip_bad=config.on_bad_image == "skip")


def loader_settings(config: FilledConfig, images: dict[str, Any]) -> LoaderSettings:
    """Say how batches are made.

    Args:
        config: its defaults are filled in.
        images: timm's description of the evaluation images.
    """
    return LoaderSettings(
        images,
        config.batch_size,
        config.validation_batch_size or config.batch_size,
        config.loader,
        config.workers,
        config.seed,
        {name: getattr(config, name) for name in AUGMENTATION} | {"interpolation": _train_interpolation(config)},
        skip_bad=config.on_bad_image == "skip",
        shuffle_buffer=config.shuffle_buffer,
        padding=config.padding,
        repeats=config.aug_repeats,
        decoded_cache=not config.no_decoded_cache,
    )


def _train_interpolation(config: FilledConfig) -> str | None:
    """Name how training images are resized; None: as those of the evaluation."""
    of_both = "random" if config.interpolation == "random" and not config.no_aug else None
    return config.train_interpolation or of_both
