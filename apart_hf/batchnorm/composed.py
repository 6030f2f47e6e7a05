"""Grouped batch normalisation in plain tensor operations: for statistics of several processes, and for devices.

Operations are few, since on a device each of them costs a launch, and 16-bit activations are not copied to float32.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from apart_hf.batchnorm.affine import Affine
from apart_hf.batchnorm.layouts import Layout
from apart_hf.batchnorm.normalised import Gradients, MeanAndVariance, Normalisation, Normalised, Statistics


def forward(x: Tensor, affine: Affine, how: Normalisation) -> Normalised:
    """Compute as `kernels.forward` does."""
    layout = Layout(x, how.grouping)
    v = layout.view(x)
    mu, var = _statistics(v, layout, affine.weight.dtype)
    count: Tensor | None = None
    if how.sync is not None:
        mu, var, count = _over_processes(mu, var, v.numel() // mu.numel(), how.sync)
    how.track(mu, var, count / (count - 1) if count is not None else 1 / (1 - mu.numel() / v.numel()))
    statistics = Statistics.of(mu, var, how.eps, count)
    return Normalised(scaled(x, layout, affine, statistics, shifted=how.shifted), statistics)


def scaled(x: Tensor, layout: Layout, affine: Affine, statistics: Statistics, *, shifted: bool) -> Tensor:
    """Compute weight * (x - mu) / sigma + bias + shift * mu/sigma in one operation on activations."""
    v, (offset, scale) = layout.view(x), offset_and_scale(affine, statistics, shifted=shifted)
    terms = offset.view(layout.vector), v, scale.view(layout.vector)
    out = torch.addcmul(*terms) if v.dtype == scale.dtype else torch.addcmul(*terms, out=torch.empty_like(v))
    return layout.back(out, x)


def offset_and_scale(affine: Affine, statistics: Statistics, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """Sort what `scaled` computes by what it multiplies: offset + scale * x, (groups * C,) each."""
    (weight, bias, shift), ratio = affine, statistics.mu_over_sigma()
    offset = torch.addcmul(bias, shift - weight, ratio) if shifted else torch.addcmul(bias, weight, ratio, value=-1)
    return offset, weight * statistics.inv_sigma


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, saved: Statistics, how: Normalisation, needs_grad_x: bool
) -> Gradients:
    """Compute as `kernels.backward` does."""
    layout = Layout(x, how.grouping)
    v, g, vector = layout.view(x), layout.view(grad_out), layout.vector
    ratio = saved.mu_over_sigma()
    minus_x_hat = torch.addcmul(ratio.view(vector), v, saved.inv_sigma.view(vector), value=-1)
    grad_bias = g.sum(layout.dims, dtype=minus_x_hat.dtype).flatten()
    minus_grad_weight = (minus_x_hat * g).sum(layout.dims).flatten()
    if not needs_grad_x:
        return Gradients(None, -minus_grad_weight, grad_bias)
    total_bias, minus_total_weight, share = grad_bias, minus_grad_weight, minus_grad_weight.numel() / v.numel()
    if saved.values is not None:
        totals = torch.stack([grad_bias, minus_grad_weight])
        dist.all_reduce(totals, group=how.sync)
        (total_bias, minus_total_weight), share = totals / saved.values, 1.0
    # weight/sigma * (g - (total_bias + x_hat * total_weight) / count), in the memory of x_hat
    mean = torch.addcmul(total_bias.view(vector), minus_x_hat, minus_total_weight.view(vector), out=minus_x_hat)
    grad_x = torch.sub(g, mean, alpha=share, out=mean)
    scale = (weight * saved.inv_sigma).view(vector)
    grad_x = grad_x.mul_(scale) if grad_x.dtype == x.dtype else torch.mul(grad_x, scale, out=torch.empty_like(v))
    return Gradients(layout.back(grad_x, x, gradient=True), -minus_grad_weight, grad_bias)


def _statistics(v: Tensor, layout: Layout, dtype: torch.dtype) -> MeanAndVariance:
    """Compute mean and biased variance of each group, (groups * C,) each."""
    if v.dtype == dtype:
        var, mu = torch.var_mean(v, layout.dims, correction=0)
        return mu.flatten(), var.flatten()
    mu = v.mean(layout.dims, keepdim=True, dtype=dtype)
    size = torch.linalg.vector_norm(v - mu, dim=layout.dims)
    return mu.flatten(), (size.square() * (mu.numel() / v.numel())).flatten()


def _over_processes(mu: Tensor, var: Tensor, count: int, sync: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean, biased variance and number of values of the batches of all processes together."""
    mine = torch.stack([mu, var, torch.full_like(mu, count)])
    each = [torch.empty_like(mine) for _ in range(dist.get_world_size(sync))]
    dist.all_gather(each, mine, group=sync)
    mus, variances, counts = torch.stack(each, dim=1)
    total = counts.sum(0)
    mean = (counts * mus).sum(0) / total
    return mean, (counts * (variances + (mus - mean).square())).sum(0) / total, total[:1]
