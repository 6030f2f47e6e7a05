"""What the kernels give and share: normalised activations, and the statistics that they were normalised by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MeanAndVariance = tuple[Tensor, Tensor]


class Statistics(NamedTuple):
    """Holds what a batch was normalised by; (groups * C,) each, group after group.

    Args:
        mu: means.
        inv_sigma: 1/sigma.
        ratio: mu/sigma, where it was needed.
        values: how many are behind them, (1,), where they are of several processes.
    """

    mu: Tensor
    inv_sigma: Tensor
    ratio: Tensor | None = None
    values: Tensor | None = None


class Normalised(NamedTuple):
    """Holds the outcome of a forward: the output, like x, and the statistics."""

    out: Tensor
    statistics: Statistics


class Gradients(NamedTuple):
    """Holds the outcome of a backward: for x, and for weight and bias of each group, (groups * C,) each."""

    x: Tensor | None
    weight: Tensor
    bias: Tensor


def is_single_dtype(x: Tensor) -> bool:
    """Tell whether x is of the dtype of its weights: float16 and bfloat16 come with float32 weights."""
    return x.dtype in (torch.float32, torch.float64)


def is_real(x: Tensor) -> bool:
    """Tell whether x has values now, so that operations which no compiler knows may take it."""
    return not torch.compiler.is_compiling() and type(x) is Tensor
