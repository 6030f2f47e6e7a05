"""Many tensors as the pieces of one: what is done to all of them is then one operation, and one launch on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flat_copy(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Copy tensors one behind the other, each in the order of memory of its fellow in `like`.

    Two lists with the same fellows are in the same order, so that products and norms of the whole are those of the
    lists. Nothing is copied beside that, in channels_last neither.

    Args:
        tensors: of any shapes, on one device.
        like: of the same shapes, usually the parameters that they belong to.

    Returns:
        (sum of elements,), and its pieces: views with the shapes of `tensors`.
    """
    layouts = [_strides(fellow) for fellow in like]
    rows = [_row(tensor, strides) for tensor, strides in zip(tensors, layouts)]
    flat = torch.cat(rows)
    return flat, pieces(flat, like)


def pieces(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the views of `flat` that have the shapes of `like`, see `flat_copy`."""
    found, start = [], 0
    for fellow in like:
        found.append(flat.as_strided(fellow.shape, _strides(fellow), start))
        start += fellow.numel()
    return found


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of a tensor that fills its memory without gaps, and those of a contiguous one for others."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1 and stride != expected:
            return torch.empty(tensor.shape, device="meta").stride()
        expected *= size
    return tensor.stride()


def _row(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """View a tensor as a row in the order of memory; it is brought into the layout first where it has another."""
    tensor = tensor.detach()
    if tensor.stride() != strides:
        tensor = tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def safe_ratio(radius: float | Tensor, norm: Tensor) -> Tensor:
    """Divide a radius by a norm; where that is zero, the ratio is finite, so that a zero gradient times it is zero."""
    number = torch.finfo(norm.dtype)
    return (radius / norm.clamp_min(number.tiny)).clamp_max(number.max)
