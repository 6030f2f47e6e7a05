"""Batches and outputs of any kind: tensors in dicts, lists, tuples, dataclasses, and containers of those."""

from __future__ import annotations

import array
import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence
from typing import Any

from torch import Tensor

DESCEND: Any = object()  # what `map_nodes` is told where a node is to be looked into


def map_nodes(change: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `change` to the nodes of a tree of mappings, sequences and dataclasses, from the root on.

    Args:
        change: what becomes of a node, which is then not looked into; or DESCEND.
        tree: tensors, containers, and whatever else stands between them.

    Returns:
        A copy whose containers are of the same types, with the attributes that they had; a container in which nothing
        was changed is not copied.
    """
    new = change(tree)
    if new is not DESCEND:
        return new
    if isinstance(tree, tuple):
        items = [map_nodes(change, item) for item in tree]
        if all(new is old for new, old in zip(items, tree)):
            return tree
        return tree._make(items) if hasattr(tree, "_make") else type(tree)(items)
    mapped = ((key, child, map_nodes(change, child)) for key, child in children(tree))
    changed = {key: new for key, child, new in mapped if new is not child}
    return _with(tree, changed) if changed else tree


def map_tensors(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply `change` to every tensor of a tree, see `map_nodes`; it returns the tensor itself where nothing becomes."""
    return map_nodes(lambda node: change(node) if isinstance(node, Tensor) else DESCEND, tree)


def is_container(node: Any) -> bool:
    """Tell whether `map_nodes` looks into a node: a mapping, a list, a tuple, a dataclass."""
    if isinstance(node, (Mapping, tuple)):
        return True
    if isinstance(node, MutableSequence):
        return not isinstance(node, (bytearray, array.array))
    return dataclasses.is_dataclass(node) and not isinstance(node, type)


def children(tree: Any) -> Iterable[tuple[Any, Any]]:
    """Give (key, index or field, child) of a container; nothing for any other object."""
    if not is_container(tree):
        return ()
    if isinstance(tree, Mapping):
        return tree.items()
    if isinstance(tree, MutableSequence):
        return enumerate(tree)
    names = [field.name for field in dataclasses.fields(tree) if hasattr(tree, field.name)]
    return [(name, getattr(tree, name)) for name in names]


def _with(tree: Any, changed: dict[Any, Any]) -> Any:
    """Copy a container with other children; its constructor, which may ask for more, is not called."""
    if isinstance(tree, Mapping) and not isinstance(tree, MutableMapping):
        return type(tree)({**tree, **changed})  # type: ignore[call-arg]
    new = copy.copy(tree)
    attributes = getattr(new, "__dict__", {})
    for key, child in changed.items():
        if isinstance(tree, (Mapping, MutableSequence)):
            new[key] = child
        elif key in attributes:
            attributes[key] = child  # a frozen dataclass as well
        else:
            getattr(type(new), key).__set__(new, child)  # one with slots
    return new


def detached(output: Any) -> Any:
    """Detach every tensor of an output, which keeps its type."""
    return map_tensors(lambda tensor: tensor.detach() if tensor.requires_grad else tensor, output)
