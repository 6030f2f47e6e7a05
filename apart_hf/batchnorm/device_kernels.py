"""The kernels with the fewest launches: for GPUs, where a launch costs more than the vectors that it works on."""

from __future__ import annotations

from torch import Tensor

from apart_hf.batchnorm import composed, framework
from apart_hf.batchnorm.affine import Affine
from apart_hf.batchnorm.layouts import Grouping, has_runs
from apart_hf.batchnorm.normalised import Gradients, MeanAndVariance, Normalised, Statistics


def forward(
    x: Tensor,
    affine: Affine,
    buffers: MeanAndVariance | None,
    momentum: float,
    eps: float,
    grouping: Grouping,
    shifted: bool,
) -> Normalised:
    """Compute as `kernels.forward` does."""
    chosen = composed if has_runs(x, grouping) else framework
    return chosen.forward(x, affine, buffers, momentum, eps, grouping, shifted)


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, saved: Statistics, eps: float, grouping: Grouping, needs_grad_x: bool
) -> Gradients:
    """Compute as `kernels.backward` does."""
    if has_runs(x, grouping):
        return composed.backward(grad_out, x, weight, saved, grouping, needs_grad_x)
    return framework.backward(grad_out, x, weight, saved, eps, grouping, needs_grad_x)
