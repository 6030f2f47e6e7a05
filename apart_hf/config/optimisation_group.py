"""Settings of the optimisation: its length, batches and optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from apart_hf.config.setting import setting

_setting = partial(setting, group="optimisation")


@dataclass(frozen=True)
class OptimisationGroup:
    """Says how the weights are moved by their gradients."""

    epochs: int | None = _setting(None, "length in epochs [200; demo: 6]", role="what", least=1, recorded=1)
    budget: float | None = _setting(
        None,
        "cost in units of the given epochs of plain training: epochs and milestones become "
        "budget / passes times theirs (apart, 2 passes: 200 epochs are budget 2)",
        role="what",
        above=0,
        in_tables=False,
    )
    max_steps: int | None = _setting(
        None, "stop after N optimizer steps; still evaluates and exports", role="what", least=1, recorded=31
    )
    batch_size: int | None = _setting(
        None, "images a process and step [128; demo: 64]", role="what", least=1, recorded=2, flags=("-b",)
    )
    validation_batch_size: int | None = _setting(
        None, "images a process in evaluation [--batch-size]", role="how", least=1, flags=("-vb",)
    )
    grad_accum_steps: int = _setting(1, "batches whose mean gradient makes one step", role="what", least=1, recorded=3)
    opt: str = _setting(
        "momentum",
        "timm optimizer; momentum is SGD without Nesterov",
        role="what",
        on_resume="fixed",
        recorded=4,
        recorded_by_default=True,
        metavar="NAME",
    )
    lr: float | None = _setting(None, "learning rate [0.1; demo: 0.05]", role="what", least=0, recorded=5)
    lr_base: float | None = _setting(
        None,
        "learning rate for --lr-base-size images a step; --lr becomes it in proportion",
        role="what",
        least=0,
        decides="lr",
    )
    lr_base_size: int = _setting(
        256, "images a step that --lr-base is meant for", role="what", least=1, idle_without="lr_base"
    )
    lr_base_scale: Literal["linear", "sqrt"] | None = _setting(
        None,
        "how --lr grows with the batch [sqrt for ada* and lamb optimizers, else linear]",
        role="what",
        idle_without="lr_base",
    )
    momentum: float = _setting(0.9, "SGD momentum", role="what", least=0, recorded=6, recorded_by_default=True)
    weight_decay: float | None = _setting(
        None, "on all parameters [0.0005, the paper's; demo: 0.005]", role="what", least=0, recorded=7
    )
    layer_decay: float | None = _setting(
        None,
        "learning rate of each layer, as a share of that of the layer above it [the same for all]",
        role="what",
        on_resume="fixed",
        above=0,
        most=1,
        over="a share of the rate of the layer above, at most 1 (0.75 is common)",
        recorded=35,
    )
    opt_eps: float | None = _setting(None, "epsilon of the optimizer [its own]", role="what", above=0, recorded=36)
    opt_betas: list[float] | None = _setting(
        None,
        "betas of the optimizer [its own]",
        role="what",
        least=0,
        below=1,
        over="must be below 1 (0.9 0.999 is common)",
        recorded=37,
    )
    opt_kwargs: list[str] | None = _setting(
        None,
        "further arguments of the optimizer, for instance amsgrad=True",
        role="what",
        on_resume="fixed",
        recorded=38,
        metavar="KEY=VALUE",
    )
    epsilon_warmup_epochs: int = _setting(
        0,
        "epochs in which epsilon rises from 0, in a straight line, from --perturb-from-epoch on",
        role="what",
        least=0,
        recorded=34,
        in_tables=False,
    )
    rho_min: float | None = _setting(
        None,
        "rho follows the learning rate: --rho at its highest, this at --min-lr; GSAM's paper: half of rho [rho stays]",
        role="what",
        least=0,
        recorded=66,
        in_tables=False,
    )
    clip_grad: float | None = _setting(
        None, "largest norm of the combined gradient, or what --clip-mode says [off]", role="what", least=0, recorded=13
    )
    clip_mode: Literal["norm", "value", "agc"] = _setting(
        "norm",
        "what --clip-grad bounds; norm: that of the whole gradient; value: each component; agc: the norm of each "
        "unit's gradient, as a share of its weights', but for the classifier",
        role="what",
        recorded=39,
    )
    # free, to go on after such a step, or before, from where both do the same
    on_nonfinite: Literal["stop", "skip"] = _setting(
        "stop",
        "what to do about a step whose loss or gradient is not finite; stop: end the run, "
        "saying where it comes from; skip: leave the step out, and count it",
        role="how",
        on_resume="free",
    )
