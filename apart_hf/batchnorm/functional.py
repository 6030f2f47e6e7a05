"""Batch normalisation with perturbed statistics as one function (Eq. 3 of the APART paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from apart_hf.batchnorm import kernels
from apart_hf.batchnorm.affine import Affine, LayerParameters, affine_of
from apart_hf.batchnorm.layouts import ONE_GROUP, Grouping
from apart_hf.batchnorm.normalised import Normalisation, Statistics


class _ShiftedBatchNorm(torch.autograd.Function):
    """Computes weight * x_hat + bias + shift * mu/sigma by batch-norm kernels.

    The last term is constant over a channel of a group, so neither pass of the backward touches an activation beyond
    what BN itself does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, how: Normalisation) -> Tensor:
        out, saved = kernels.forward(x, Affine(weight, bias, shift), how)
        ctx.save_for_backward(x, weight, *saved)
        ctx.how = how
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *statistics = ctx.saved_tensors
        saved = Statistics(*statistics)
        grad_x, grad_weight, grad_bias = kernels.backward(grad_out, x, weight, saved, ctx.how, ctx.needs_input_grad[0])
        grad_shift = saved.mu_over_sigma() * grad_bias if ctx.needs_input_grad[3] else None
        return grad_x, grad_weight, grad_bias, grad_shift, None


def shifted_batch_norm(x: Tensor, affine: Affine, how: Normalisation) -> Tensor:
    """Normalise a batch, and scale and shift it: `perturbed_batch_norm` for an affine part that was computed before.

    Args:
        x: (N * how.grouping.rows, C, ...) activations.
        affine: its vectors are (how.grouping.groups * C,) each, differentiable.
        how: statistics are taken and used.

    Returns:
        A tensor of x's shape, dtype and memory format.
    """
    return _ShiftedBatchNorm.apply(x, *affine, how)


def perturbed_batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    delta_mu: Tensor,
    delta_sigma: Tensor,
    *,
    eps: float,
    buffers: tuple[Tensor, Tensor] | None = None,
    momentum: float = 0.0,
    grouping: Grouping = ONE_GROUP,
    sync: ProcessGroup | None = None,
    shifted: bool = True,
) -> Tensor:
    r"""Normalise a batch with perturbed batch statistics (Eq. 3):

        BN(x; delta_mu, delta_sigma) = gamma (1 + delta_sigma) * (x - (1 + delta_mu) mu) / sigma + beta

    with mu and sigma = sqrt(var + eps) of each group of samples (Algorithm 1, lines 7-11). mu/sigma in the shift term,
    delta_mu * mu/sigma, is a constant for autograd, as in the authors' code; the ordinary BN gradient through
    (x - mu)/sigma stays.

    Args:
        x: (N * grouping.rows, C, ...) activations.
        gamma, beta, delta_mu, delta_sigma: (C,) each, differentiable.
        eps: added to the variance.
        buffers: running (mean, var), (C,) each, updated in place with `momentum` as `F.batch_norm` does; only with one
            group and shifted=False. None: the statistics leave no trace.
        grouping: the groups that rows of x belong to.
        sync: processes whose groups share their statistics: group k is that of all of them together (SyncBatchNorm).
        shifted: False promises that both deltas are zero, and saves work; their gradients are those of Eq. 3 at zero
            (Algorithm 1, lines 1-2).

    Returns:
        A tensor of x's shape, dtype and memory format.
    """
    affine = affine_of(LayerParameters(gamma, beta, delta_mu, delta_sigma), grouping.groups)
    return shifted_batch_norm(x, affine, Normalisation(eps, buffers, momentum, grouping, sync, shifted))
