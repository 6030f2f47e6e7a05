"""Mean and variance by rows of memory: what the framework's CPU kernel computes, in half of its time."""

from __future__ import annotations

import torch
from torch import Tensor

from apart_hf.batchnorm.normalised import MeanAndVariance

BLOCK = 2**16  # values that stay in a core's cache between the difference and its norm
SHORTEST = 32  # values in a row, below which the framework's kernel is as fast


def has_long_rows(x: Tensor) -> bool:
    """Tell whether statistics by rows are the faster ones: of (N, C, ...), contiguous, with maps that are not small."""
    return x.dim() > 2 and x.is_contiguous() and x[0, 0].numel() >= SHORTEST


def row_statistics(x: Tensor) -> MeanAndVariance:
    """Compute mean and biased variance of each channel, by means of rows and then squares about the mean.

    Args:
        x: (N, C, ...), contiguous; a row is what one sample has of one channel.

    Returns:
        (C,) each. Errors are those of pairwise sums, no larger than the framework's.
    """
    rows = x.flatten(2)
    count, channels, length = rows.shape
    mu = rows.mean(2).mean(0)
    sizes, about = rows.new_empty(count, channels), mu.view(1, channels, 1)
    samples, width = max(1, BLOCK // (channels * length)), min(channels, max(1, BLOCK // length))
    for i in range(0, count, samples):
        for k in range(0, channels, width):
            part = slice(i, i + samples), slice(k, k + width)
            torch.linalg.vector_norm(rows[part] - about[:, part[1]], dim=2, out=sizes[part])
    return mu, sizes.square_().mean(0) / length
