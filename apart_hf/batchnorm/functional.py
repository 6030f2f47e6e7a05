"""Batch normalisation with perturbed statistics as one function (Eq. 3 of the APART paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from apart_hf.batchnorm import kernels
from apart_hf.batchnorm.layouts import ONE_GROUP, Grouping


def _scale(gamma: Tensor, delta_sigma: Tensor) -> Tensor:
    return (gamma * (1 + delta_sigma)).to(gamma.dtype)  # the kernels want the dtype of beta


class _PerturbedBatchNorm(torch.autograd.Function):
    """Computes Eq. 3 by batch-norm kernels; see `perturbed_batch_norm` for the symbols.

    With w = gamma (1 + delta_sigma), the output is w x_hat + beta - w delta_mu (mu/sigma). The last term is constant
    over a channel of a group, so neither pass of the backward touches an activation beyond what BN itself does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        delta_mu: Tensor,
        delta_sigma: Tensor,
        buffers: kernels.MeanAndVariance | None,
        momentum: float,
        eps: float,
        grouping: Grouping,
        sync: ProcessGroup | None,
        shifted: bool,
    ) -> Tensor:
        weight = _scale(gamma, delta_sigma) if shifted else gamma
        out, mu, inv_sigma, count = kernels.forward(
            x, weight, beta, weight * delta_mu if shifted else None, buffers, momentum, eps, grouping, sync
        )
        ctx.save_for_backward(x, gamma, delta_mu, delta_sigma, mu, inv_sigma, count)
        ctx.eps, ctx.grouping, ctx.sync, ctx.shifted = eps, grouping, sync, shifted
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, delta_mu, delta_sigma, mu, inv_sigma, count = ctx.saved_tensors
        weight = _scale(gamma, delta_sigma) if ctx.shifted else gamma
        grad_x, grad_w, grad_b = kernels.backward(
            grad_out, x, weight, mu, inv_sigma, count, ctx.eps, ctx.grouping, ctx.sync, ctx.needs_input_grad[0]
        )
        grad_shift = -((mu * inv_sigma).view(ctx.grouping.groups, -1) * grad_b).sum(0)  # dL/d(w delta_mu)
        grad_w, grad_b = grad_w.sum(0), grad_b.sum(0)
        if ctx.shifted:
            grad_w = grad_w + delta_mu * grad_shift
        grad_gamma = grad_w * (1 + delta_sigma) if ctx.shifted else grad_w
        return (grad_x, grad_gamma, grad_b, weight * grad_shift, gamma * grad_w, *[None] * 6)


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
    return _PerturbedBatchNorm.apply(
        x, gamma, beta, delta_mu, delta_sigma, buffers, momentum, eps, grouping, sync, shifted
    )
