"""Groups that are runs of samples, one after another through the framework's kernels, without a copy of activations."""

from __future__ import annotations

import torch
from torch import Tensor

from apart_hf.batchnorm.affine import Affine
from apart_hf.batchnorm.composed import scaled
from apart_hf.batchnorm.layouts import Layout
from apart_hf.batchnorm.normalised import Gradients, Normalisation, Normalised, Statistics, is_single_dtype


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
