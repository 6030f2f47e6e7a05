"""Batches and outputs of any kind: tensors in dicts, lists, tuples, dataclasses, and containers of those."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence
from typing import Any

import torch
from torch import Tensor

from apart_hf.batchnorm.layouts import is_channels_last
from apart_hf.errors import ApartError


def map_tensors(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply `change` to every tensor of a tree of mappings, sequences and dataclasses.

    Args:
        change: what becomes of a tensor; it returns the tensor itself where nothing does.
        tree: tensors, containers, and whatever else stands between them.

    Returns:
        A copy whose containers are of the same types, with the attributes that they had; a container in which no tensor
        was changed is not copied.
    """
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, tuple):
        items = [map_tensors(change, item) for item in tree]
        if all(new is old for new, old in zip(items, tree)):
            return tree
        return tree._make(items) if hasattr(tree, "_make") else type(tree)(items)
    mapped = ((key, child, map_tensors(change, child)) for key, child in _children(tree))
    changed = {key: new for key, child, new in mapped if new is not child}
    return _with(tree, changed) if changed else tree


def _children(tree: Any) -> Iterable[tuple[Any, Any]]:
    """Give (key, index or field, child) of a container; nothing for any other object."""
    if isinstance(tree, Mapping):
        return tree.items()
    if isinstance(tree, MutableSequence) and not isinstance(tree, bytearray):
        return enumerate(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree) if hasattr(tree, field.name)]
        return [(name, getattr(tree, name)) for name in names]
    return ()


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


def rows_of(tree: Any) -> list[int]:
    """List, in ascending order, the different lengths that the first dimension of the tree's tensors has."""
    found: set[int] = set()

    def look(tensor: Tensor) -> Tensor:
        if tensor.dim():
            found.add(tensor.shape[0])
        return tensor

    map_tensors(look, tree)
    return sorted(found)


def count_samples(batch: Any, cure: str = "give it: accumulate(batch, loss_fn, samples=N)") -> int:
    """Find the number of samples of a batch: the first dimension of all of its tensors (but those without one).

    Args:
        batch: of any kind.
        cure: what the message advises.

    Raises:
        ApartError: where they disagree, or there is none.
    """
    rows = rows_of(batch)
    if len(rows) == 1:
        return rows[0]
    if not rows and hasattr(batch, "__len__") and not isinstance(batch, (Tensor, str, tuple, Mapping, MutableSequence)):
        return len(batch)  # a batch of a kind of its own
    if rows:
        problem = f"has tensors of {_listed(rows)} rows, so that its number of samples cannot be told"
    else:
        problem = "has no tensor with a row for each sample"
    raise ApartError(f"the batch ({type(batch).__name__}) {problem}; {cure}.")


def count_images(images: Any, targets: Any) -> int:
    """Find the number of samples of images and targets of any kind, of which a list may hold one image an item.

    Raises:
        ApartError: where it cannot be told.
    """
    if isinstance(images, Tensor):
        return count_samples(images)
    is_list = isinstance(images, (list, tuple)) and len(rows_of((images, targets))) != 1
    if is_list and isinstance(targets, (list, tuple, Tensor)) and len(targets) == len(images):
        return len(images)
    return count_samples(images)


def check_rows(batch: Any, samples: int, *, strict: bool) -> None:
    """Refuse a batch that samples cannot be taken from.

    Args:
        batch: of any kind.
        samples: M, in the batch.
        strict: refuse tensors of another first dimension. False: they are the same for all samples.

    Raises:
        ApartError: where no tensor has as many rows, or one that has not is to be refused.
    """
    rows = rows_of(batch)
    if samples not in rows:
        raise ApartError(
            f"no tensor of the batch ({type(batch).__name__}) has {samples} rows, so that the samples of the second "
            "pass cannot be taken from it; use tensors with a row for each sample, or ratio=1."
        )
    others = [length for length in rows if length != samples]
    if strict and others:
        raise ApartError(
            f"a tensor of the batch has {others[0]} rows for {samples} samples, so that the samples of the second pass "
            "cannot be taken from it; use accumulate(batch, loss_fn, samples=N), which leaves such tensors whole, or "
            "ratio=1."
        )


def select_samples(batch: Any, chosen: Tensor, samples: int) -> Any:
    """Take the samples of a batch that are `chosen`, from every tensor whose first dimension is the number of samples.

    Args:
        batch: of any kind.
        chosen: (N,) indices.
        samples: M, in the batch.

    Returns:
        The batch of these samples, of the same kind, in the memory format that it had. Other tensors stay.
    """

    def take(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != samples:
            return tensor
        part = tensor.index_select(0, chosen.to(tensor.device))
        return part.contiguous(memory_format=torch.channels_last) if is_channels_last(tensor) else part

    return map_tensors(take, batch)


def _listed(numbers: list[int]) -> str:
    return " and ".join([", ".join(map(str, numbers[:-1])), str(numbers[-1])])
