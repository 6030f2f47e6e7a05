"""One attacker of the min-max game (Eq. 2), as a strategy sees it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apart_hf.errors import ApartError


class Perturbation:
    """What is moved before the second pass. It lives through one call of a strategy like this:

    with perturbation.observed(samples):     # the clean pass: collect the gradient to climb
        ...forward, backward...
    perturbation.ascend(generator)           # move against the defender
    with perturbation.applied(samples):      # the perturbed pass; undone at the end, also by an exception
        ...forward, backward...
    """

    #: Hyper-parameters with their defaults; a boolean is an option that is off.
    defaults: ClassVar[dict[str, Any]] = {}
    #: True where `ascend` reads p.grad, so that it must hold the gradient of the clean pass alone.
    reads_weight_gradients: ClassVar[bool] = False

    def __init__(self, model: nn.Module, **hyper: Any):
        self.model = model

    def check(self, samples: int) -> None:
        """Raise ApartError where a perturbed pass over `samples` samples is impossible."""

    def observed(self, samples: int) -> AbstractContextManager[None]:
        return nullcontext()

    def ascend(self, generator: torch.Generator | None = None) -> None: ...

    def order(self, samples: int) -> Tensor | None:
        """An order of the samples, indices (samples,), in which the perturbed pass expects them; None: as they are."""

    def applied(self, samples: int) -> AbstractContextManager[None]:
        return nullcontext()


def checked_radius(name: str, value: Any, usual: str) -> float:
    """`value`, if it is a radius: a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ApartError(f"{name}={value!r}: the radius must be a finite number >= 0 ({usual}).")
    return value


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
