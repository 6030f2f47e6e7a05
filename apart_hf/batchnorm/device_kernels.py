"""The kernels with the fewest launches: for GPUs, where a launch costs more than the vectors that it works on."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from apart_hf.batchnorm import composed, framework
from apart_hf.batchnorm.affine import Affine
from apart_hf.batchnorm.layouts import has_runs
from apart_hf.batchnorm.normalised import Gradients, Normalisation, Normalised, Statistics


def forward(x: Tensor, affine: Affine, how: Normalisation) -> Normalised:
    """Compute as `kernels.forward` does."""
    return _chosen(x, how).forward(x, affine, how)


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, saved: Statistics, how: Normalisation, needs_grad_x: bool
) -> Gradients:
    """Compute as `kernels.backward` does."""
    return _chosen(x, how).backward(grad_out, x, weight, saved, how, needs_grad_x)


def _chosen(x: Tensor, how: Normalisation) -> ModuleType:
    return composed if has_runs(x, how.grouping) else framework
