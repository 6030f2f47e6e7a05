"""The samples of a batch of any kind: the part of them that the second pass takes."""

from __future__ import annotations

import array
import copy
import numbers
from collections.abc import MutableSequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apart_hf.batchnorm.layouts import is_channels_last
from apart_hf.errors import ApartError
from apart_hf.strategies.batches import DESCEND, is_container, map_nodes
from apart_hf.strategies.item_lists import is_alike, is_list, is_list_of_images, listed_samples

_DEPTH = 3  # of objects within objects that are looked into


def check_rows(batch: Any, samples: int, *, strict: bool) -> None:
    """Refuse a batch that samples cannot be taken from.

    Args:
        batch: of any kind.
        samples: M, in the batch.
        strict: refuse tensors of another first dimension. False: they are the same for all samples.

    Raises:
        ApartError: where nothing has as many rows or items, a tensor has others that is to be refused, or it cannot be
            told which the samples are.
    """
    name, found = type(batch).__name__, _Samples(batch, samples)
    for node in found.others:
        if (held := _held(node, samples, _DEPTH)) is not None:
            raise ApartError(
                f"the batch ({name}) holds an object of type {type(node).__name__} with {held} for its {samples} "
                "samples, which the second pass cannot take a part of; put tensors, arrays and lists into a dict or a "
                "dataclass instead, or use ratio=1."
            )
    if found.unclear is not None:
        raise ApartError(
            f"the batch ({name}) has a list of {samples} tensors of the shape {tuple(found.unclear[0].shape)}, and it "
            "cannot be told whether a sample is an item or a row; stack the images to one tensor, or use ratio=1."
        )
    if not found.has_any:
        raise ApartError(
            f"no tensor of the batch ({name}) has {samples} rows, and no list as many items, so that the samples of "
            "the second pass cannot be taken from it; use tensors with a row for each sample, or ratio=1."
        )
    lengths = [node.shape[0] for node in found.others if isinstance(node, Tensor) and node.dim()]
    if strict and lengths:
        raise ApartError(
            f"a tensor of the batch has {lengths[0]} rows for {samples} samples, so that the samples of the second "
            "pass cannot be taken from it; give it a row for each sample, or, where it belongs to all of them (class "
            f"weights), use accumulate(batch, loss_fn, samples={samples}), which leaves it whole; or ratio=1."
        )


def can_be_sorted(batch: Any, samples: int) -> bool:
    """Tell whether all that may belong to single samples is rows of tensors: these can be put in another order.

    Args:
        batch: of any kind.
        samples: M, in the batch.
    """
    found = _Samples(batch, samples)
    return found.in_tensors and found.unclear is None and all(_is_of_all(node) for node in found.others)


def select_samples(batch: Any, chosen: Tensor, samples: int) -> Any:
    """Take the samples of a batch that are `chosen`: rows of tensors and arrays, items of lists, of that length.

    Args:
        batch: of any kind.
        chosen: (N,) indices.
        samples: M, in the batch.

    Returns:
        The batch of these samples, of the same kind, in the memory format that it had. What has another length stays.
    """
    found = _Samples(batch, samples)
    return map_nodes(lambda node: _part(node, chosen) if found.is_of_samples(node) else DESCEND, batch)


class _Samples:
    """Tells which parts of a batch have a row or an item for each sample.

    Args:
        batch: of any kind.
        samples: M, in the batch.

    Attributes:
        has_any: whether a part has.
        in_tensors: whether all that have are tensors.
        others: what has not, and is no container.
        unclear: a list of images, of which items or channels may be the samples; None: there is none.
    """

    def __init__(self, batch: Any, samples: int):
        self.samples, self._lists = samples, listed_samples(batch) == samples
        self.has_any, self.in_tensors, self.unclear = False, True, None
        self.others: list[Any] = []
        map_nodes(self._look, batch)

    def is_of_samples(self, node: Any) -> bool:
        """Tell whether a node has a row or an item for each sample; a list of whole batches has not."""
        if isinstance(node, (Tensor, np.ndarray)):
            return node.ndim > 0 and node.shape[0] == self.samples
        if not is_list(node) or len(node) != self.samples:
            return False
        return (self._lists and is_alike(node)) or not any(map(self._has_samples, node))

    def _has_samples(self, tree: Any) -> bool:
        found = []

        def look(node: Any) -> Any:
            if isinstance(node, (Tensor, np.ndarray)) and node.ndim and node.shape[0] == self.samples:
                found.append(node)
            return DESCEND

        map_nodes(look, tree)
        return bool(found)

    def _look(self, node: Any) -> Any:
        if self.is_of_samples(node):
            self.has_any = True
            self.in_tensors &= isinstance(node, Tensor)
            return node
        if is_list_of_images(node) and len(node) == self.samples:
            self.unclear = node
        if not is_container(node):
            self.others.append(node)
        return DESCEND


def _is_of_all(node: Any) -> bool:
    """Tell whether a node that has no row for each sample cannot hold what belongs to one of them."""
    if isinstance(node, Tensor):
        return not node.dim()
    return node is None or isinstance(node, (str, bytes, numbers.Number)) or callable(node)


def _held(node: Any, samples: int, depth: int) -> str | None:
    """Say what an object that is no container holds for each sample; None: nothing is found."""
    if isinstance(node, Tensor) or callable(node) or isinstance(node, (str, bytes, numbers.Number, np.ndarray)):
        return None
    if hasattr(node, "__len__") and not is_list(node) and len(node) == samples:
        return f"{samples} items"
    slots = (name for kind in type(node).__mro__ for name in (getattr(kind, "__slots__", None) or ()))
    values = dict(getattr(node, "__dict__", {})) | {name: getattr(node, name, None) for name in slots}
    for name, value in values.items():
        inner = _Samples(value, samples)
        if inner.has_any and not isinstance(value, tuple):  # a pair may be a size
            return f"the attribute {name!r}"
        if depth and any(_held(other, samples, depth - 1) for other in inner.others):
            return f"the attribute {name!r}"
    return None


def _part(node: Any, chosen: Tensor) -> Any:
    """Take rows or items of a node, which keeps its type."""
    if isinstance(node, Tensor):
        part = node.index_select(0, chosen.to(node.device))
        part = part.contiguous(memory_format=torch.channels_last) if is_channels_last(node) else part
        return part if isinstance(node, nn.Parameter) or isinstance(part, type(node)) else _of_type(node, part)
    indices = chosen.tolist()  # which waits for a device, and tensors need not
    if isinstance(node, np.ndarray):
        return node[indices]
    items = [node[index] for index in indices]
    if isinstance(node, array.array):
        return array.array(node.typecode, items)
    if not isinstance(node, MutableSequence):
        return tuple(items) if isinstance(node, tuple) else items
    new = copy.copy(node)
    new.clear()
    new.extend(items)
    return new


def _of_type(node: Tensor, part: Tensor) -> Tensor:
    """Give rows of a tensor its type and attributes, which torchvision's tv_tensors lose by indexing."""
    new = part.as_subclass(type(node))
    new.__dict__.update(vars(node))
    return new
