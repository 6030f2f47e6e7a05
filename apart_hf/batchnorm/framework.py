"""The framework's batch-norm kernels on a view in which each group of samples has channels of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from apart_hf.batchnorm.affine import Affine
from apart_hf.batchnorm.layouts import fold_groups, unfold_groups
from apart_hf.batchnorm.normalised import Gradients, Normalisation, Normalised, Statistics


def forward(x: Tensor, affine: Affine, how: Normalisation) -> Normalised:
    """Compute as `kernels.forward` does; the shift, which needs the statistics, is added to the kernel's output."""
    mean, var = how.buffers if how.buffers is not None else (None, None)
    weight, bias, shift = affine
    out, mu, inv_sigma = torch.native_batch_norm(
        fold_groups(x, how.grouping), weight, bias, mean, var, True, how.momentum, how.eps
    )
    ratio = None
    if how.shifted:
        ratio = mu * inv_sigma
        vector = (1, -1, *[1] * (x.dim() - 2))
        out.addcmul_(shift.view(vector), ratio.view(vector))
    return Normalised(unfold_groups(out, x, how.grouping), Statistics(mu, inv_sigma, ratio))


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, saved: Statistics, how: Normalisation, needs_grad_x: bool
) -> Gradients:
    """Compute as `kernels.backward` does."""
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        fold_groups(grad_out, how.grouping),
        fold_groups(x, how.grouping),
        weight,
        None,
        None,
        saved.mu,
        saved.inv_sigma,
        True,
        how.eps,
        [needs_grad_x, True, True],
    )
    if grad_x is not None:
        grad_x = unfold_groups(grad_x, x, how.grouping, gradient=True)
    return Gradients(grad_x, grad_weight, grad_bias)
