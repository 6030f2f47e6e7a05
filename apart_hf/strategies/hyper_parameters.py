"""The names of the methods and of their hyper-parameters, for type checkers: `METHODS` holds the defaults.

A test compares the two, so that a method added there is declared here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, TypedDict

import torch
from torch import Tensor

MethodName = Literal["standard", "apart", "sam", "apart-sam", "asam", "apart-asam", "sam-on", "random-bn", "ghost-bn"]

Uneven = Literal["error", "plain", "fit"]


class HasBackward(Protocol):
    """What a strategy asks of an accelerator, such as `accelerate.Accelerator`."""

    def backward(self, loss: Tensor) -> Any: ...


class LossOptions(TypedDict, total=False):
    """What every method takes beside its hyper-parameters, as `create_loss` does."""

    generator: torch.Generator | None
    every: int
    uneven: Uneven


class Standard(LossOptions, total=False):
    """What every method takes beside its hyper-parameters; see `create_strategy`."""

    accelerator: HasBackward | None
    autocast: Callable[[], AbstractContextManager[Any]] | None


class _GhostBN(TypedDict, total=False):
    groups: int
    ratio: float


class _RandomBN(_GhostBN, total=False):
    epsilon: float


class _Apart(_RandomBN, total=False):
    local_attack: bool


class _Sam(TypedDict, total=False):
    rho: float
    global_norm: bool


class _Asam(_Sam, total=False):
    eta: float


class GhostBN(_GhostBN, Standard, total=False):
    """The second pass over N = ratio * M samples, in `groups` groups."""


class GhostBNLoss(_GhostBN, LossOptions, total=False):
    """The same for `create_loss`."""


class RandomBN(_RandomBN, Standard, total=False):
    """Statistics that are perturbed by `epsilon`."""


class RandomBNLoss(_RandomBN, LossOptions, total=False):
    """The same for `create_loss`."""


class Apart(_Apart, Standard, total=False):
    """Statistics that are perturbed by the adversary."""


class ApartLoss(_Apart, LossOptions, total=False):
    """The same for `create_loss`."""


class Sam(_Sam, Standard, total=False):
    """Weights that are perturbed by `rho`."""


class SamLoss(_Sam, LossOptions, total=False):
    """The same for `create_loss`."""


class Asam(_Asam, Standard, total=False):
    """Weights that are perturbed in proportion to their size."""


class AsamLoss(_Asam, LossOptions, total=False):
    """The same for `create_loss`."""


class ApartSam(_Apart, _Sam, Standard, total=False):
    """Statistics and weights perturbed at once."""


class ApartSamLoss(_Apart, _Sam, LossOptions, total=False):
    """The same for `create_loss`."""


class ApartAsam(_Apart, _Asam, Standard, total=False):
    """Statistics, and weights in proportion to their size, perturbed at once."""


class ApartAsamLoss(_Apart, _Asam, LossOptions, total=False):
    """The same for `create_loss`."""
