"""Batch normalisation of groups of samples at once: forward and backward, nothing of APART.

Statistics and affine vectors are per group and channel, flattened group by group to (groups * C,). The framework's
own batch-norm kernels do the work where they can. `_composed` is the same formula in plain tensor operations, for what
they cannot: blocks without a copy, and statistics over several processes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from apart_hf.batchnorm.layouts import Grouping, Layout, channels_innermost, fold_groups, unfold_groups

MeanAndVariance = tuple[Tensor, Tensor]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    buffers: MeanAndVariance | None,
    momentum: float,
    eps: float,
    grouping: Grouping,
    sync: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute weight * (x - mu)/sigma + bias - shift * mu/sigma, with mu and sigma of each group.

    Args:
        x: (N * rows, C, ...).
        weight, bias, shift: (C,) each; shift None: zero.
        buffers: running (mean, var) to update, with one group; None: leave no trace.
        sync: processes whose batches share their statistics, as in SyncBatchNorm.

    Returns:
        The output, like x; mu and 1/sigma, (groups * C,) each; with `sync` the number of values behind them, else None.
    """
    if sync is not None or _composes_forward(x, grouping):
        return _composed_forward(x, weight, bias, shift, buffers, momentum, eps, grouping, sync)
    folded, weights, biases = fold_groups(x, grouping), weight.repeat(grouping.groups), bias.repeat(grouping.groups)
    if shift is None:
        mean, var = buffers if buffers is not None else (None, None)
        out, mu, inv_sigma = torch.native_batch_norm(folded, weights, biases, mean, var, True, momentum, eps)
    elif _has_fast_statistics(x, weight):
        # statistics first, so that the shift is part of the bias: one pass over x less than below
        mu, var = torch.batch_norm_update_stats(folded, None, None, 0.0)
        inv_sigma = (var + eps).rsqrt()
        biases = biases - shift.repeat(grouping.groups) * (mu * inv_sigma)
        out, _, _ = torch.native_batch_norm(folded, weights, biases, mu, var, False, 0.0, eps)
    else:
        out, mu, inv_sigma = torch.native_batch_norm(folded, weights, biases, None, None, True, 0.0, eps)
        out.sub_((shift.repeat(grouping.groups) * (mu * inv_sigma)).view(1, -1, *[1] * (x.dim() - 2)))
    return unfold_groups(out, x, grouping), mu, inv_sigma, None


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    mu: Tensor,
    inv_sigma: Tensor,
    count: Tensor | None,
    eps: float,
    grouping: Grouping,
    sync: dist.ProcessGroup | None,
    needs_grad_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute the gradients for x, and for weight and bias of each group, (groups, C) each."""
    if sync is not None or _composes_backward(x, grouping):
        grad_x, grad_w, grad_b = _composed_backward(
            grad_out, x, weight, mu, inv_sigma, count, grouping, sync, needs_grad_x
        )
    else:
        grad_x, grad_w, grad_b = torch.ops.aten.native_batch_norm_backward(
            fold_groups(grad_out, grouping),
            fold_groups(x, grouping),
            weight.repeat(grouping.groups),
            None,
            None,
            mu,
            inv_sigma,
            True,
            eps,
            [needs_grad_x, True, True],
        )
        if grad_x is not None:
            grad_x = unfold_groups(grad_x, x, grouping)
    return grad_x, grad_w.view(grouping.groups, -1), grad_b.view(grouping.groups, -1)


def _has_fast_statistics(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `torch.batch_norm_update_stats` takes x: a real CPU tensor of the weights' dtype, not a fake one."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
    )


def _single_dtype(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)  # float16 and bfloat16 come with float32 weights


def _composes_forward(x: Tensor, grouping: Grouping) -> bool:
    """Tell whether to compute blocks in place, which the framework's kernels would have to copy."""
    return grouping.blocks and grouping.groups > 1 and channels_innermost(x) and _single_dtype(x)


def _composes_backward(x: Tensor, grouping: Grouping) -> bool:
    """Tell whether to compute without the framework's kernels: also for one group where channels lie innermost.

    The framework's CPU kernel adds up a channel naively there, which would lift the noise around structural zeros of
    g_delta (see `strategies.bn_perturbations.DEAD_ZONE`) by a factor of 2 to 4.
    """
    plain = grouping.groups == 1 and x.device.type == "cpu"
    return (plain or grouping.blocks) and channels_innermost(x) and _single_dtype(x)


def _statistics(v: Tensor, layout: Layout, weight: Tensor) -> MeanAndVariance:
    """Compute mean and biased variance of each group, (groups * C,) each."""
    if not _has_fast_statistics(v, weight):
        var, mu = torch.var_mean(v, layout.dims, correction=0)
    elif layout.innermost:
        parts = [torch.batch_norm_update_stats(group, None, None, 0.0) for group in v]
        mu, var = (torch.cat(part) for part in zip(*parts))
    else:
        mu, var = torch.batch_norm_update_stats(v, None, None, 0.0)
    return mu.flatten(), var.flatten()


def _composed_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    buffers: MeanAndVariance | None,
    momentum: float,
    eps: float,
    grouping: Grouping,
    sync: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    layout = Layout(x, grouping)
    v = layout.view(x).to(weight.dtype)
    mu, var = _statistics(v, layout, weight)
    count: Tensor | None = None
    if sync is not None:
        mu, var, count = _over_processes(mu, var, v.numel() // mu.numel(), sync)
    if buffers is not None:
        unbiased = var * (count / (count - 1) if count is not None else 1 / (1 - mu.numel() / v.numel()))
        for buffer, value in zip(buffers, (mu, unbiased)):
            buffer.lerp_(value.to(buffer.dtype), momentum)
    inv_sigma = (var + eps).rsqrt()
    scale = weight.repeat(grouping.groups) * inv_sigma
    offset = bias.repeat(grouping.groups) - scale * mu
    if shift is not None:
        offset = offset - shift.repeat(grouping.groups) * (mu * inv_sigma)
    out = torch.addcmul(offset.view(layout.vector), v, scale.view(layout.vector)).to(x.dtype)
    return layout.back(out, x), mu, inv_sigma, count


def _composed_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    mu: Tensor,
    inv_sigma: Tensor,
    count: Tensor | None,
    grouping: Grouping,
    sync: dist.ProcessGroup | None,
    needs_grad_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    layout = Layout(x, grouping)
    v, g = layout.view(x).to(weight.dtype), layout.view(grad_out).to(weight.dtype)
    grad_b = g.sum(layout.dims).flatten()
    grad_w = (v - mu.view(layout.vector)).mul_(g).sum(layout.dims).flatten() * inv_sigma
    if not needs_grad_x:
        return None, grad_w, grad_b
    total_w, total_b = grad_w, grad_b
    values = v.numel() // mu.numel() if count is None else count
    if sync is not None:
        totals = torch.stack([grad_w, grad_b])
        dist.all_reduce(totals, group=sync)
        total_w, total_b = totals
    # scale * (g - total_b / count - (v - mu) / sigma * total_w / count), sorted by what it multiplies
    scale = weight.repeat(grouping.groups) * inv_sigma
    of_v = -scale * inv_sigma * total_w / values
    rest = -scale * total_b / values - of_v * mu
    grad_x = torch.addcmul(rest.view(layout.vector), v, of_v.view(layout.vector))
    grad_x = grad_x.addcmul_(g, scale.view(layout.vector)).to(x.dtype)
    return layout.back(grad_x, x), grad_w, grad_b


def _over_processes(mu: Tensor, var: Tensor, count: int, sync: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean, biased variance and number of values of the batches of all processes together."""
    mine = torch.stack([mu, var, torch.full_like(mu, count)])
    each = [torch.empty_like(mine) for _ in range(dist.get_world_size(sync))]
    dist.all_gather(each, mine, group=sync)
    mus, variances, counts = torch.stack(each, dim=1)
    total = counts.sum(0)
    mean = (counts * mus).sum(0) / total
    return mean, (counts * (variances + (mus - mean).square())).sum(0) / total, total[:1]
