"""Runs of samples, one after another through the framework's kernels, without a copy of activations.

A run is a group, or a part of the one group that stays in a cache while it is read a second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat

import torch
from torch import Tensor

from apart_hf.batchnorm.affine import Affine
from apart_hf.batchnorm.composed import offset_and_scale
from apart_hf.batchnorm.normalised import Gradients, Normalisation, Normalised, Statistics, is_single_dtype
from apart_hf.batchnorm.wide_rows import WideRows

PARTS = 16  # runs that one group is cut into
_kernel = torch.ops.aten.native_batch_norm_backward


def forward(x: Tensor, affine: Affine, how: Normalisation) -> Normalised:
    """Compute as `kernels.forward` does, with a shift and without buffers."""
    groups = how.grouping.groups
    # given float32 buffers the kernel computes in float32, also for 16-bit activations
    mean, variance = affine.weight.new_zeros(2, x.shape[1])
    found = zip(*(torch.batch_norm_update_stats(run, mean, variance, 0.0) for run in x.chunk(groups)))
    mu, var = (torch.cat(parts) for parts in found)
    statistics = Statistics.of(mu, var, how.eps)
    if is_single_dtype(x):
        return Normalised(_scaled(x, affine, statistics, groups), statistics)
    bias, nothing = torch.addcmul(affine.bias, affine.shift, statistics.mu_over_sigma()), mu.new_empty(0)
    out = torch.empty_like(x)
    runs = (tensor.chunk(groups) for tensor in (x, out, affine.weight, bias, mu, var))
    for run, to, weights, biases, mean, variance in zip(*runs):
        torch.native_batch_norm(run, weights, biases, mean, variance, False, 0.0, how.eps, out=(to, nothing, nothing))
    return Normalised(out, statistics)


def _scaled(x: Tensor, affine: Affine, statistics: Statistics, groups: int) -> Tensor:
    """Compute as `composed.scaled` does, by wide rows."""
    wide, out = WideRows(x, groups), torch.empty_like(x)
    vectors = offset_and_scale(affine, statistics, shifted=True)
    offset, scale = (wide.vector(vector).unsqueeze(1) for vector in vectors)
    v, to = (wide.view(tensor).unflatten(0, (groups, -1)).flatten(1, 2) for tensor in (x, out))
    torch.addcmul(offset, v, scale, out=to)
    return out


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, saved: Statistics, how: Normalisation, needs_grad_x: bool
) -> Gradients:
    """Compute as `kernels.backward` does; one group only of float32 or float64."""
    if is_single_dtype(x):
        return _sums_first(grad_out, x, weight, saved, how, needs_grad_x)
    grad_x = torch.empty_like(x) if needs_grad_x else None
    found = []
    runs = (tensor.chunk(how.grouping.groups) for tensor in (grad_out, x, weight, saved.mu, saved.inv_sigma))
    for k, (g, run, weights, mu, inv_sigma) in enumerate(zip(*runs)):
        of_run, *sums = _kernel(g, run, weights, None, None, mu, inv_sigma, True, how.eps, [needs_grad_x, True, True])
        if grad_x is not None:
            grad_x.narrow(0, k * len(run), len(run)).copy_(of_run)
        found.append(sums)
    grad_weight, grad_bias = map(torch.cat, zip(*found))
    return Gradients(grad_x, grad_weight, grad_bias)


def _sums_first(
    grad_out: Tensor, x: Tensor, weight: Tensor, saved: Statistics, how: Normalisation, needs_grad_x: bool
) -> Gradients:
    """Compute the sums over each run, and then the gradient for x in its place.

    The framework's kernel adds up a channel naively where channels lie innermost, which would lift the noise around
    structural zeros of g_delta (see `strategies.bn_perturbations.DEAD_ZONE`) by a factor of 2 to 4. So one group is cut
    into runs as well, and their sums are added.
    """
    groups, (mu, inv_sigma, *_) = how.grouping.groups, saved
    number = groups if groups > 1 else PARTS
    gs, xs = grad_out.chunk(number), x.chunk(number)

    def of_runs(vector: Tensor) -> Iterable[Tensor]:
        return vector.chunk(groups) if groups > 1 else repeat(vector)

    found = (
        _kernel(g, run, weights, None, None, mus, inv_sigmas, True, how.eps, [False, True, True])
        for g, run, weights, mus, inv_sigmas in zip(gs, xs, of_runs(weight), of_runs(mu), of_runs(inv_sigma))
    )
    _, *sums = zip(*found)
    grad_weight, grad_bias = map(torch.cat if groups > 1 else _added, sums)
    if not needs_grad_x:
        return Gradients(None, grad_weight, grad_bias)
    # weight/sigma * (g - grad_bias / count - (v - mu)/sigma * grad_weight / count), sorted by what it multiplies
    scale, share = weight * inv_sigma, mu.numel() / x.numel()
    of_x = -scale * inv_sigma * grad_weight * share
    rest = -scale * grad_bias * share - of_x * mu
    grad_x, wide = torch.empty_like(x), WideRows(x, groups)
    views = (wide.view(tensor).chunk(number) for tensor in (x, grad_out, grad_x))
    vectors = (wide.vector(v) if groups > 1 else repeat(wide.vector(v)) for v in (rest, of_x, scale))
    for run, g, to, rests, of_run, scales in zip(*views, *vectors):
        torch.addcmul(rests, run, of_run, out=to).addcmul_(g, scales)
    return Gradients(grad_x, grad_weight, grad_bias)


def _added(of_runs: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(of_runs)).sum(0)
