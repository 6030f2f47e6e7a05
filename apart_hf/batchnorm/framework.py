"""The framework's batch-norm kernels on a view in which each group of samples has channels of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from apart_hf.batchnorm.affine import Affine
from apart_hf.batchnorm.layouts import Grouping, fold_groups, unfold_groups
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
    """Compute as `kernels.forward` does; the shift, which needs the statistics, is added to the kernel's output."""
    mean, var = buffers if buffers is not None else (None, None)
    weight, bias, shift = affine
    out, mu, inv_sigma = torch.native_batch_norm(fold_groups(x, grouping), weight, bias, mean, var, True, momentum, eps)
    ratio = None
    if shifted:
        ratio = mu * inv_sigma
        vector = (1, -1, *[1] * (x.dim() - 2))
        out.addcmul_(shift.view(vector), ratio.view(vector))
    return Normalised(unfold_groups(out, x, grouping), Statistics(mu, inv_sigma, ratio))


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, saved: Statistics, eps: float, grouping: Grouping, needs_grad_x: bool
) -> Gradients:
    """Compute as `kernels.backward` does."""
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        fold_groups(grad_out, grouping),
        fold_groups(x, grouping),
        weight,
        None,
        None,
        saved.mu,
        saved.inv_sigma,
        True,
        eps,
        [needs_grad_x, True, True],
    )
    if grad_x is not None:
        grad_x = unfold_groups(grad_x, x, grouping, gradient=True)
    return Gradients(grad_x, grad_weight, grad_bias)
