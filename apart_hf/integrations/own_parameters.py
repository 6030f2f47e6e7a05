"""The parameters that a strategy holds beside the model's, in optimizers that others have made."""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim import Optimizer

from apart_hf.strategies.auxiliary_batchnorm import stand_ins_of
from apart_hf.strategies.two_pass import TwoPassStrategy


def join_groups(optimizers: Iterable[Optimizer], strategy: TwoPassStrategy) -> None:
    """Put an auxiliary gamma and beta into the group of the ones in whose place they stand: groups stay as many.

    So they have the learning rate and weight decay of those, and schedulers that were made already know them. What
    stands for a parameter that no optimizer has is in none either. Those that are there already are not added again.

    Args:
        optimizers: before their state is loaded.
        strategy: of the model that they train.
    """
    held = stand_ins_of(strategy.perturbations)
    names = {theirs: name for name, theirs in strategy.model.named_parameters()}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        present = set(group["params"])
        joining = [theirs for theirs, own in held.items() if theirs in present and own not in present]
        group["params"].extend(held[theirs] for theirs in joining)  # in place: LBFGS keeps the list
        if "param_names" in group:
            group["param_names"].extend(f"auxiliary.{names[theirs]}" for theirs in joining)
