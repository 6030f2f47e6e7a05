"""Settings of the learning rate's schedule, which is timm's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from apart_hf.config.setting import setting

_setting = partial(setting, group="schedule")
ScheduleName = Literal["multistep", "cosine", "step", "constant", "tanh", "poly", "wsd", "rsqrt", "none"]


@dataclass(frozen=True)
class ScheduleGroup:
    """Says how the learning rate changes in the course of a training."""

    sched: ScheduleName | None = _setting(
        None,
        "learning-rate schedule of timm; constant: with warmup; none: without [multistep; demo: cosine]",
        role="what",
        recorded=8,
    )
    # None: by step for the first two, which have always been so here; by epoch, as in timm, for the others
    sched_on_updates: bool | None = _setting(
        None, "follow the schedule step by step, not epoch by epoch [multistep, cosine: on]", role="what", recorded=40
    )
    decay_epochs: float | None = _setting(
        None,
        "step: epochs from one fall of the learning rate to the next [90]; wsd, rsqrt: length of the last phase, in "
        "epochs or, below 1, as a share of all [0.2]",
        role="what",
        above=0,
        recorded=41,
    )
    decay_rate: float = _setting(
        0.1,
        "multistep, step: factor by which the learning rate falls; poly: the power",
        role="what",
        above=0,
        recorded=42,
        flags=("--dr",),
    )
    decay_milestones: list[int] | None = _setting(
        None,
        "multistep: epochs after which the learning rate falls [1/2 and 3/4 of all]",
        role="what",
        least=1,
        outside="epochs are counted from 1",
        recorded=9,
    )
    min_lr: float = _setting(0.0, "where cosine, tanh, poly, wsd and rsqrt end", role="what", least=0, recorded=10)
    warmup_lr: float = _setting(0.0, "where the warmup starts", role="what", least=0, recorded=12)
    warmup_epochs: int = _setting(0, "epochs of linear warmup", role="what", least=0, recorded=11)
    warmup_prefix: bool = _setting(
        False, "the warmup comes before --epochs, and not out of them", role="what", recorded=43
    )
    cooldown_epochs: int = _setting(
        0, "cosine, tanh, poly: further epochs at --min-lr, after --epochs", role="what", least=0, recorded=44
    )
    lr_noise: list[float] | None = _setting(
        None,
        "shares of the training between which the learning rate is noisy; one: from there on [off]",
        role="what",
        least=0,
        most=1,
        over="a share of the training is at most 1 (0.42 0.9 is common)",
        recorded=45,
    )
    lr_noise_pct: float = _setting(
        0.67, "largest noise, as a share of the learning rate", role="what", above=0, recorded=46
    )
    lr_noise_std: float = _setting(1.0, "standard deviation of the noise", role="what", above=0, recorded=47)
