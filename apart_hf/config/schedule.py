"""What timm's scheduler is told, and how many epochs it makes of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from timm.scheduler import create_scheduler_v2

from apart_hf.errors import ApartError, first_line

if TYPE_CHECKING:
    from apart_hf.config.train_config import FilledConfig


def schedule_arguments(config: FilledConfig, updates_per_epoch: int) -> dict[str, Any]:
    """Return the arguments of `timm.scheduler.create_scheduler_v2`, without the optimizer.

    `decay_milestones` are epochs *after* which the learning rate falls; timm lets it fall one epoch, or step, before.

    Args:
        config: its defaults are filled in.
        updates_per_epoch: optimizer steps of an epoch.
    """
    on_updates = config.sched_on_updates
    if on_updates is None:
        on_updates = config.sched in ("multistep", "cosine")
    half = 0.5 / updates_per_epoch if on_updates else 0.5
    return {
        "sched": config.sched,
        "num_epochs": config.epochs,
        "decay_epochs": config.decay_epochs,
        "decay_milestones": [milestone + half for milestone in config.decay_milestones],
        "decay_rate": config.decay_rate,
        "min_lr": config.min_lr,
        "warmup_lr": config.warmup_lr,
        "warmup_epochs": config.warmup_epochs,
        "warmup_prefix": config.warmup_prefix,
        "cooldown_epochs": config.cooldown_epochs,
        "noise": config.lr_noise,
        "noise_pct": config.lr_noise_pct,
        "noise_std": config.lr_noise_std,
        "noise_seed": config.seed,
        "step_on_epochs": not on_updates,
        "updates_per_epoch": updates_per_epoch,
    }


def run_epochs(config: FilledConfig) -> int:
    """Return how many epochs a run has: its `epochs`, and what timm adds for cooldown, or warmup as a prefix.

    Raises:
        ApartError: where timm makes no such schedule.
    """
    if config.sched == "rsqrt" and not config.warmup_epochs:
        raise ApartError(
            "--sched rsqrt falls with the square root of the epochs, counted in those of the warmup, and "
            "--warmup-epochs is 0; give it, for instance --warmup-epochs 5."
        )
    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    arguments = schedule_arguments(config, 1) | {"step_on_epochs": True}
    try:
        return int(create_scheduler_v2(nothing, **arguments)[1])
    except (AssertionError, ValueError) as error:
        raise ApartError(f"--sched {config.sched} cannot be made: {first_line(error)}.") from error
