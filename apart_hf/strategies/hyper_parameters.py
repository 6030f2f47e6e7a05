"""The names of the methods and of their hyper-parameters, for type checkers: `METHODS` holds the defaults.

A test compares the two, so that a method added there is declared here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, TypedDict

import torch
from torch import Tensor

MethodName = Literal[
    "standard",
    "apart",
    "sam",
    "apart-sam",
    "asam",
    "apart-asam",
    "sam-on",
    "gsam",
    "awp",
    "random-bn",
    "ghost-bn",
    "advprop",
    "fast-advprop",
    "advbn",
    "apart-advprop",
]

Uneven = Literal["error", "plain", "fit"]


class HasBackward(Protocol):
    """What a strategy asks of an accelerator, such as `accelerate.Accelerator`."""

    def backward(self, loss: Tensor) -> Any: ...


class LossOptions(TypedDict, total=False):
    """What every method takes beside its hyper-parameters, as `create_loss` does."""

    generator: torch.Generator | None
    every: int
    uneven: Uneven
    mean: float | Sequence[float] | None
    std: float | Sequence[float] | None


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


class _FastAdvProp(TypedDict, total=False):
    pixel_epsilon: float
    pixel_step: float
    ratio: float
    aux_affine: bool


class _Pixels(TypedDict, total=False):
    pixel_epsilon: float
    pixel_step: float
    steps: int
    random_start: bool


class _AdvProp(_Pixels, total=False):
    ratio: float
    aux_affine: bool


class _AdvBN(TypedDict, total=False):
    layer: str
    epsilon: float
    step_size: float
    steps: int
    ratio: float
    aux_affine: bool


class _Gsam(_Sam, total=False):
    alpha: float


class _Awp(TypedDict, total=False):
    gamma: float
    global_norm: bool


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


class AdvProp(_AdvProp, Standard, total=False):
    """Images that are perturbed by up to `pixel_epsilon` / 255, in `steps`."""


class AdvPropLoss(_AdvProp, LossOptions, total=False):
    """The same for `create_loss`."""


class FastAdvProp(_FastAdvProp, Standard, total=False):
    """A share `ratio` of the images, perturbed in one step."""


class FastAdvPropLoss(_FastAdvProp, LossOptions, total=False):
    """The same for `create_loss`."""


class ApartAdvProp(_Apart, _Pixels, Standard, total=False):
    """Statistics and images perturbed at once."""


class ApartAdvPropLoss(_Apart, _Pixels, LossOptions, total=False):
    """The same for `create_loss`."""


class Gsam(_Gsam, Standard, total=False):
    """Weights that are perturbed by `rho`, and `alpha` of the surrogate gap's gradient."""


class GsamLoss(_Gsam, LossOptions, total=False):
    """The same for `create_loss`."""


class Awp(_Awp, Standard, total=False):
    """Weights that are perturbed by `gamma` of their norms."""


class AwpLoss(_Awp, LossOptions, total=False):
    """The same for `create_loss`."""


class AdvBN(_AdvBN, Standard, total=False):
    """Features of one `layer` whose mean and deviation are perturbed by up to `epsilon`, in `steps`."""


class AdvBNLoss(_AdvBN, LossOptions, total=False):
    """The same for `create_loss`."""
