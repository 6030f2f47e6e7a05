"""Runs of samples, one after another through the framework's kernels, without a copy of activations.

A run is a group, or a part of the one group that stays in a cache while it is read a second time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apart_hf.batchnorm.affine import Affine
from apart_hf.batchnorm.composed import scaled
from apart_hf.batchnorm.layouts import Layout
from apart_hf.batchnorm.normalised import Gradients, Normalisation, Normalised, Statistics, is_single_dtype

PARTS = 16  # runs that one group is cut into


def forward(x: Tensor, affine: Affine, how: Normalisation) -> Normalised:
    """Compute as `kernels.forward` does, with a shift and without buffers."""
    groups = how.grouping.groups
    # given float32 buffers the kernel computes in float32, also for 16-bit activations
    mean, variance = affine.weight.new_zeros(2, x.shape[1])
    found = zip(*(torch.batch_norm_update_stats(run, mean, variance, 0.0) for run in x.chunk(groups)))
    mu, var = (torch.cat(parts) for parts in found)
    statistics = Statistics.of(mu, var, how.eps)
    if is_single_dtype(x):
        return Normalised(scaled(x, Layout(x, how.grouping), affine, statistics, shifted=True), statistics)
    bias, nothing = torch.addcmul(affine.bias, affine.shift, statistics.mu_over_sigma()), mu.new_empty(0)
    out = torch.empty_like(x)
    runs = (tensor.chunk(groups) for tensor in (x, out, affine.weight, bias, mu, var))
    for run, to, weights, biases, mean, variance in zip(*runs):
        torch.native_batch_norm(run, weights, biases, mean, variance, False, 0.0, how.eps, out=(to, nothing, nothing))
    return Normalised(out, statistics)


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, saved: Statistics, how: Normalisation, needs_grad_x: bool
) -> Gradients:
    """Compute as `kernels.backward` does."""
    grad_x = torch.empty_like(x) if needs_grad_x else None
    found = []
    runs = (tensor.chunk(how.grouping.groups) for tensor in (grad_out, x, weight, saved.mu, saved.inv_sigma))
    for k, (g, run, weights, mu, inv_sigma) in enumerate(zip(*runs)):
        of_run, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            g, run, weights, None, None, mu, inv_sigma, True, how.eps, [needs_grad_x, True, True]
        )
        if grad_x is not None:
            grad_x.narrow(0, k * len(run), len(run)).copy_(of_run)
        found.append((grad_weight, grad_bias))
    grad_weights, grad_biases = zip(*found)
    return Gradients(grad_x, torch.cat(grad_weights), torch.cat(grad_biases))


def backward_of_one_group(
    grad_out: Tensor, x: Tensor, weight: Tensor, saved: Statistics, how: Normalisation, needs_grad_x: bool
) -> Gradients:
    """Compute as `kernels.backward` does, for one group of float32 or float64.

    The framework's kernel adds up a channel naively where channels lie innermost, which would lift the noise around
    structural zeros of g_delta (see `strategies.bn_perturbations.DEAD_ZONE`) by a factor of 2 to 4. So it adds up each
    run, and the sums of all are added here.
    """
    mu, inv_sigma, *_ = saved
    runs = list(zip(grad_out.chunk(PARTS), x.chunk(PARTS)))
    found = (
        torch.ops.aten.native_batch_norm_backward(
            g, run, weight, None, None, mu, inv_sigma, True, how.eps, [False, True, True]
        )
        for g, run in runs
    )
    _, *sums = zip(*found)
    grad_weight, grad_bias = (torch.stack(of_runs).sum(0) for of_runs in sums)
    if not needs_grad_x:
        return Gradients(None, grad_weight, grad_bias)
    # weight/sigma * (g - grad_bias / count - (v - mu)/sigma * grad_weight / count), sorted by what it multiplies
    scale, share = weight * inv_sigma, mu.numel() / x.numel()
    of_v = -scale * inv_sigma * grad_weight * share
    rest = -scale * grad_bias * share - of_v * mu
    zero, one, nothing = torch.zeros_like(mu), torch.ones_like(mu), mu.new_empty(0)
    grad_x = torch.empty_like(x)
    for (g, run), to in zip(runs, grad_x.chunk(PARTS)):
        torch.native_batch_norm(run, of_v, rest, zero, one, False, 0.0, 0.0, out=(to, nothing, nothing))
        to.movedim(1, -1).addcmul_(g.movedim(1, -1), scale)
    return Gradients(grad_x, grad_weight, grad_bias)
