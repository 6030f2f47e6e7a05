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


class HasBackward(Protocol):
    """What a strategy asks of an accelerator, such as `accelerate.Accelerator`."""

    def backward(self, loss: Tensor) -> Any: ...


class Standard(TypedDict, total=False):
    """What every method takes beside its hyper-parameters; see `create_strategy`."""

    accelerator: HasBackward | None
    generator: torch.Generator | None
    autocast: Callable[[], AbstractContextManager[Any]] | None


class GhostBN(Standard, total=False):
    """The second pass over N = ratio * M samples, in `groups` groups."""

    groups: int
    ratio: float


class RandomBN(GhostBN, total=False):
    """Statistics that are perturbed by `epsilon`."""

    epsilon: float


class Apart(RandomBN, total=False):
    """Statistics that are perturbed by the adversary."""

    local_attack: bool


class Sam(Standard, total=False):
    """Weights that are perturbed by `rho`."""

    rho: float
    global_norm: bool


class Asam(Sam, total=False):
    """Weights that are perturbed in proportion to their size."""

    eta: float


class ApartSam(Apart, Sam, total=False):
    """Statistics and weights perturbed at once."""


class ApartAsam(Apart, Asam, total=False):
    """Statistics, and weights in proportion to their size, perturbed at once."""
