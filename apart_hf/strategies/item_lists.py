"""Lists with one item for each sample, as collate functions of detectors make them: which lists of a batch are such."""

from __future__ import annotations

import numbers
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from apart_hf.strategies.batches import DESCEND, children, map_nodes

_CHANNELS = (1, 3, 4)  # of an image


def is_list(node: Any) -> bool:
    """Tell whether a node may have an item for each sample: a sequence that is no text and no tuple of named parts."""
    if isinstance(node, tuple):
        return type(node) is tuple
    return isinstance(node, Sequence) and not isinstance(node, (str, bytes, bytearray, memoryview))


def is_list_of_images(node: Any) -> bool:
    """Tell whether a node is a list of tensors (C, H, W), as far as shapes tell."""
    if not (is_list(node) and len(node)):
        return False
    return all(isinstance(item, Tensor) and item.dim() == 3 and item.shape[0] in _CHANNELS for item in node)


def is_alike(items: Sequence[Any]) -> bool:
    """Tell whether all items are of one kind: tensors of as many dimensions, dicts of the same, and so on."""
    return len({_kind(item) for item in items}) == 1


def listed_samples(batch: Any) -> int | None:
    """Find the number of samples of a batch that lists them: its lists have an item for each.

    The tensors of such a batch are in lists of one length, of items that are alike (or have as many rows), and what
    belongs to an item does not agree in a first dimension, which is how a list of whole batches is told from these.

    Args:
        batch: of any kind.

    Returns:
        The length of these lists; None: tensors hold the samples, as far as can be told.
    """
    lists: list[Sequence[Any]] = []
    outside: set[int] = set()

    def look(node: Any) -> Any:
        if isinstance(node, Tensor):
            outside.update(node.shape[:1])
        elif is_list(node) and len(node) and is_alike(node):
            lists.append(node)
        else:
            return DESCEND
        return node

    map_nodes(look, batch)
    lengths = {len(one) for one in lists if _content(one)[0]}
    if len(lengths) != 1 or outside - lengths:
        return None
    (length,) = lengths
    if outside and any(is_list_of_images(one) and len(one[0]) != length for one in lists):
        return length  # as many images as others have rows
    for items in zip(*(one for one in lists if len(one) == length)):
        tensors, has_more = _content(items)
        rows = {tensor.shape[0] for tensor in tensors if tensor.dim()}
        with_rows = sum(bool(tensor.dim()) for tensor in tensors)
        if len(rows) > 1 or (with_rows < 2 and (has_more or with_rows < len(tensors))):
            return length
    return None


def _content(tree: Any) -> tuple[list[Tensor], bool]:
    """Collect the tensors of a tree; and whether there are numbers or text beside them."""
    tensors: list[Tensor] = []
    others = []

    def look(node: Any) -> Any:
        if isinstance(node, Tensor):
            tensors.append(node)
            return node
        if isinstance(node, (numbers.Number, str)):
            others.append(node)
        return DESCEND

    map_nodes(look, tree)
    return tensors, bool(others)


def _kind(node: Any) -> Hashable:
    if isinstance(node, Tensor):
        return node.dim(), node.is_floating_point()
    if isinstance(node, numbers.Number):
        return numbers.Number
    if is_list(node):
        return type(node), frozenset(_kind(item) for item in node)
    if isinstance(node, Mapping):
        return type(node), frozenset((key, _kind(value)) for key, value in node.items())
    return type(node), tuple(_kind(child) for _, child in children(node))
