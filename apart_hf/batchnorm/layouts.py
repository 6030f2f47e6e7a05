"""How groups of samples lie in memory: the views of a batch in which each group has channels of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Grouping(NamedTuple):
    """Says how the rows of x, (N * rows, C, ...), are spread over groups of samples.

    Args:
        groups: their number, n; divides N.
        rows: consecutive rows that one sample has in this layer: 1, or more for tokens and windows.
        blocks: group k holds the k-th run of N/n samples; a view where channels lie innermost (channels_last).
            False: sample i is in group i mod n; a view of a contiguous (N, C, ...) tensor with n * C channels.
    """

    groups: int = 1
    rows: int = 1
    blocks: bool = False


ONE_GROUP = Grouping()


def is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def fold_groups(x: Tensor, grouping: Grouping) -> Tensor:
    """Give each group of samples channels of its own: (N*rows, C, ...) -> (N*rows/groups, groups*C, ...)."""
    groups, rows, blocks = grouping
    if groups == 1:
        return x
    length, channels, *space = x.shape
    if blocks:
        x = x.reshape(groups, -1, channels, *space).transpose(0, 1)
    elif rows > 1:
        x = x.reshape(-1, groups, rows, channels, *space).transpose(1, 2)
    return x.reshape(length // groups, groups * channels, *space)


def unfold_groups(x: Tensor, like: Tensor, grouping: Grouping, *, gradient: bool = False) -> Tensor:
    """Undo `fold_groups`, in the memory format of `like`. A gradient may be a view, which costs nothing."""
    groups, rows, blocks = grouping
    if groups == 1:
        return x
    channels, *space = like.shape[1:]
    if blocks:
        x = x.reshape(-1, groups, channels, *space).transpose(0, 1)
    elif rows > 1:
        x = x.reshape(-1, rows, groups, channels, *space).transpose(1, 2)
    out = x.reshape(like.shape) if gradient else _no_view(x.reshape(like.shape))
    if is_channels_last(like):
        out = out.contiguous(memory_format=torch.channels_last)
    return out


def _no_view(x: Tensor) -> Tensor:
    """Return x as no view: an in-place activation may follow, which autograd forbids on views made in a Function."""
    return torch.ops.aten._unsafe_view(x, x.shape)


def channels_innermost(x: Tensor) -> bool:
    return is_channels_last(x) or (x.dim() == 2 and x.is_contiguous())


def has_runs(x: Tensor, grouping: Grouping) -> bool:
    """Tell whether groups are runs of samples in x, of which the framework's kernels would need a copy."""
    return grouping.blocks and grouping.groups > 1 and channels_innermost(x)


class Layout:
    """Views a batch as a tensor in which each group's statistics are sums over `dims`, and leads back."""

    def __init__(self, x: Tensor, grouping: Grouping):
        self.grouping, groups = grouping, grouping.groups
        self.innermost = channels_innermost(x) and (grouping.blocks or groups == 1)
        self.vector: tuple[int, ...]
        if self.innermost:  # (groups, values, C)
            self.dims, self.vector = [1], (groups, 1, x.shape[1])
        else:  # (values, groups * C, ...)
            self.dims = [d for d in range(x.dim()) if d != 1]
            self.vector = (1, groups * x.shape[1], *[1] * (x.dim() - 2))

    def view(self, x: Tensor) -> Tensor:
        if self.innermost:
            return x.movedim(1, -1).reshape(self.vector[0], -1, self.vector[2])
        return fold_groups(x, self.grouping)

    def back(self, y: Tensor, like: Tensor, *, gradient: bool = False) -> Tensor:
        if not self.innermost:
            return unfold_groups(y, like, self.grouping, gradient=gradient)
        length, channels, *space = like.shape
        out = y.view(length, *space, channels).movedim(-1, 1)
        return out if gradient else _no_view(out)
