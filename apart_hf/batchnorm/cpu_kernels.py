"""The kernels that are fastest on a CPU: memory bounds them, so activations are passed over as seldom as can be.

The clean pass keeps the framework's forward, so that running statistics are bit for bit those of a plain step.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from apart_hf.batchnorm import composed, framework, runs_of_samples
from apart_hf.batchnorm.affine import Affine
from apart_hf.batchnorm.layouts import channels_innermost, fold_groups, has_runs, unfold_groups
from apart_hf.batchnorm.normalised import Gradients, Normalisation, Normalised, Statistics, is_real, is_single_dtype
from apart_hf.batchnorm.row_statistics import has_long_rows, row_statistics


def forward(x: Tensor, affine: Affine, how: Normalisation) -> Normalised:
    """Compute as `kernels.forward` does."""
    if has_runs(x, how.grouping):
        return _of_runs(x).forward(x, affine, how)
    if how.shifted and is_real(x) and is_single_dtype(x):
        return statistics_first(x, affine, how)
    return framework.forward(x, affine, how)


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, saved: Statistics, how: Normalisation, needs_grad_x: bool
) -> Gradients:
    """Compute as `kernels.backward` does."""
    is_cut = how.grouping.groups == 1 and channels_innermost(x) and is_single_dtype(x)
    if is_cut or has_runs(x, how.grouping):
        return _of_runs(x).backward(grad_out, x, weight, saved, how, needs_grad_x)
    return framework.backward(grad_out, x, weight, saved, how, needs_grad_x)


def _of_runs(x: Tensor) -> ModuleType:
    return runs_of_samples if is_real(x) else composed


def statistics_first(x: Tensor, affine: Affine, how: Normalisation) -> Normalised:
    """Compute as `kernels.forward` does, with a shift that is part of the bias, rather than a pass over the output."""
    folded = fold_groups(x, how.grouping)
    if has_long_rows(folded):
        mu, var = row_statistics(folded)
    else:
        mu, var = torch.batch_norm_update_stats(folded, None, None, 0.0)
    how.track(mu, var, 1 / (1 - mu.numel() / x.numel()))
    statistics = Statistics.of(mu, var, how.eps)
    bias = torch.addcmul(affine.bias, affine.shift, statistics.mu_over_sigma())
    out, _, _ = torch.native_batch_norm(folded, affine.weight, bias, mu, var, False, 0.0, how.eps)
    return Normalised(unfold_groups(out, x, how.grouping), statistics)
