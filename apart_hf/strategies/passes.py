"""The passes after the clean one: which perturbations stand in them, and which climb further."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from apart_hf.strategies.auxiliary_batchnorm import in_use_of, stand_ins_of
from apart_hf.strategies.gradients import frozen, gradients_aside, unsynchronised
from apart_hf.strategies.perturbation import Perturbation
from apart_hf.strategies.weight_perturbations import Weights


def further_passes(perturbation: Perturbation) -> int:
    """Count the further passes that a perturbation takes, with the hyper-parameters that it has now."""
    known = {key: getattr(perturbation, key, default) for key, default in perturbation.defaults.items()}
    return perturbation.further_passes(**known)


def shown(perturbations: Sequence[Perturbation], batch: Any) -> Any:
    """Return what the model is given in the place of a batch, in the pass that is open."""
    for perturbation in perturbations:
        batch = perturbation.shown(batch)
    return batch


@contextmanager
def released(perturbations: Sequence[Perturbation]) -> Iterator[None]:
    """Open one call of a strategy; at its end, also by an exception, perturbations hold nothing of its batch."""
    try:
        yield
    finally:
        for perturbation in perturbations:
            perturbation.release()


@contextmanager
def applied(perturbations: Sequence[Perturbation], size: int, *, climbs: bool = False) -> Iterator[None]:
    """Open a pass in which all perturbations are in place.

    Args:
        perturbations: of the method.
        size: N, the samples of the pass.
        climbs: the pass is of a further ascent.
    """
    of_weights = [p for p in perturbations if isinstance(p, Weights)]
    held = in_use_of(perturbations) if of_weights else {}
    for mover in of_weights:
        mover.move_too(held)
    with ExitStack() as opened:
        for perturbation in sorted(perturbations, key=lambda p: (p.applied_last, p not in of_weights)):
            opened.enter_context(perturbation.climbing(size) if climbs else perturbation.applied(size))
        yield


@contextmanager
def ascending(
    model: nn.Module, perturbations: Sequence[Perturbation], size: int, climbing: Sequence[Perturbation]
) -> Iterator[None]:
    """Open a pass of a further ascent, which leaves p.grad and those that do not climb as they are.

    Args:
        model: the network, possibly wrapped.
        perturbations, size: see `applied`.
        climbing: those that ascend by its gradient.
    """
    reads = any(p.reads_weight_gradients for p in climbing)
    held = stand_ins_of(perturbations).values()
    kept = gradients_aside([*model.parameters(), *held]) if reads else frozen([*model.parameters(), *held])
    # what stands is used up by being applied
    standing = [(p, dict(vars(p))) for p in perturbations if not any(p is one for one in climbing)]
    with kept, unsynchronised(model), applied(perturbations, size, climbs=True):
        yield
    for perturbation, state in standing:
        vars(perturbation).update(state)
