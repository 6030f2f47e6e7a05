"""What the kernels are told, give and share: how to normalise, the outcome, and the statistics behind it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from apart_hf.batchnorm.layouts import ONE_GROUP, Grouping

MeanAndVariance = tuple[Tensor, Tensor]


class Normalisation(NamedTuple):
    """Says how a batch is normalised.

    Args:
        eps: added to the variance.
        buffers: running (mean, var), (C,) each, updated in place with `momentum` as `F.batch_norm` does; only with one
            group and shifted=False. None: the statistics leave no trace.
        momentum: of that update.
        grouping: the groups that rows of x belong to.
        sync: processes whose groups share their statistics: group k is that of all of them together (SyncBatchNorm).
        shifted: False promises that the shift is zero.
    """

    eps: float
    buffers: MeanAndVariance | None = None
    momentum: float = 0.0
    grouping: Grouping = ONE_GROUP
    sync: ProcessGroup | None = None
    shifted: bool = True

    def track(self, mu: Tensor, var: Tensor, unbias: Tensor | float) -> None:
        """Update the buffers, where there are any.

        Args:
            mu, var: of the batch, (C,) each; the variance is biased.
            unbias: m / (m - 1) for m values of a channel.
        """
        if self.buffers is not None:
            for buffer, value in zip(self.buffers, (mu, var * unbias)):
                buffer.lerp_(value.to(buffer.dtype), self.momentum)


class Statistics(NamedTuple):
    """Holds what a batch was normalised by; (groups * C,) each, group after group.

    Args:
        mu: means.
        inv_sigma: 1/sigma.
        ratio: mu/sigma, where it was needed.
        values: how many are behind them, (1,), where they are of several processes.
    """

    mu: Tensor
    inv_sigma: Tensor
    ratio: Tensor | None = None
    values: Tensor | None = None

    @classmethod
    def of(cls, mu: Tensor, var: Tensor, eps: float, values: Tensor | None = None) -> Statistics:
        """Compute them from means and biased variances."""
        inv_sigma = (var + eps).rsqrt()
        return cls(mu, inv_sigma, mu * inv_sigma, values)

    def mu_over_sigma(self) -> Tensor:
        """Return mu/sigma, computed now where it was not needed before."""
        return self.mu * self.inv_sigma if self.ratio is None else self.ratio


class Normalised(NamedTuple):
    """Holds the outcome of a forward: the output, like x, and the statistics."""

    out: Tensor
    statistics: Statistics


class Gradients(NamedTuple):
    """Holds the outcome of a backward: for x, and for weight and bias of each group, (groups * C,) each."""

    x: Tensor | None
    weight: Tensor
    bias: Tensor


def is_single_dtype(x: Tensor) -> bool:
    """Tell whether x is of the dtype of its weights: float16 and bfloat16 come with float32 weights."""
    return x.dtype in (torch.float32, torch.float64)


def is_real(x: Tensor) -> bool:
    """Tell whether x has values now, so that operations which no compiler knows may take it."""
    return not torch.compiler.is_compiling() and type(x) is Tensor
