"""The kernels that are fastest on a CPU: memory bounds them, so activations are passed over as seldom as can be.

The clean pass keeps the framework's forward, so that running statistics are bit for bit those of a plain step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apart_hf.batchnorm import composed, framework, runs_of_samples
from apart_hf.batchnorm.affine import Affine
from apart_hf.batchnorm.layouts import Grouping, Layout, channels_innermost, fold_groups, has_runs, unfold_groups
from apart_hf.batchnorm.normalised import Gradients, MeanAndVariance, Normalised, Statistics, is_real, is_single_dtype
from apart_hf.batchnorm.row_statistics import SHORTEST, row_statistics


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
    if has_runs(x, grouping):
        if not is_real(x):
            return composed.forward(x, affine, buffers, momentum, eps, grouping, shifted)
        return runs_of_samples.forward(x, affine, eps, grouping)
    if shifted and is_real(x) and is_single_dtype(x):
        return _statistics_first(x, affine, eps, grouping)
    return framework.forward(x, affine, buffers, momentum, eps, grouping, shifted)


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, saved: Statistics, eps: float, grouping: Grouping, needs_grad_x: bool
) -> Gradients:
    """Compute as `kernels.backward` does."""
    if has_runs(x, grouping):
        if not is_real(x):
            return composed.backward(grad_out, x, weight, saved, grouping, needs_grad_x)
        return runs_of_samples.backward(grad_out, x, weight, saved, eps, grouping, needs_grad_x)
    if grouping.groups == 1 and channels_innermost(x) and is_single_dtype(x):
        return _exact_backward(grad_out, x, weight, saved, needs_grad_x)
    return framework.backward(grad_out, x, weight, saved, eps, grouping, needs_grad_x)


def _statistics_first(x: Tensor, affine: Affine, eps: float, grouping: Grouping) -> Normalised:
    """Compute a forward whose shift is part of the bias, rather than a pass over the output."""
    folded = fold_groups(x, grouping)
    if folded.is_contiguous() and folded[0, 0].numel() >= SHORTEST:
        mu, var = row_statistics(folded)
    else:
        mu, var = torch.batch_norm_update_stats(folded, None, None, 0.0)
    inv_sigma = (var + eps).rsqrt()
    ratio = mu * inv_sigma
    bias = torch.addcmul(affine.bias, affine.shift, ratio)
    out, _, _ = torch.native_batch_norm(folded, affine.weight, bias, mu, var, False, 0.0, eps)
    return Normalised(unfold_groups(out, x, grouping), Statistics(mu, inv_sigma, ratio))


def _exact_backward(grad_out: Tensor, x: Tensor, weight: Tensor, saved: Statistics, needs_grad_x: bool) -> Gradients:
    """Compute a backward of one group where channels lie innermost.

    The framework's kernel adds up a channel naively there, which would lift the noise around structural zeros of
    g_delta (see `strategies.bn_perturbations.DEAD_ZONE`) by a factor of 2 to 4.
    """
    layout, (mu, inv_sigma, *_) = Layout(x, Grouping()), saved
    v, g = layout.view(x), layout.view(grad_out)
    grad_bias = g.sum(layout.dims).flatten()
    grad_weight = (v - mu).mul_(g).sum(layout.dims).flatten() * inv_sigma
    if not needs_grad_x:
        return Gradients(None, grad_weight, grad_bias)
    # weight/sigma * (g - grad_bias / count - (v - mu)/sigma * grad_weight / count), sorted by what it multiplies
    scale, share = weight * inv_sigma, mu.numel() / v.numel()
    of_v = -scale * inv_sigma * grad_weight * share
    rest = -scale * grad_bias * share - of_v * mu
    grad_x = torch.addcmul(rest, v, of_v).addcmul_(g, scale)
    return Gradients(layout.back(grad_x, x, gradient=True), grad_weight, grad_bias)
