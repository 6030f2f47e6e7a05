"""How many samples a batch of any kind has."""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence
from typing import Any

import numpy as np
from torch import Tensor

from apart_hf.errors import ApartError
from apart_hf.strategies.batches import DESCEND, map_nodes
from apart_hf.strategies.item_lists import is_list_of_images, listed_samples


def rows_of(tree: Any, kind: Any = Tensor) -> list[int]:
    """List, in ascending order, the different lengths that the first dimension of the tree's tensors has."""
    found: set[int] = set()

    def look(node: Any) -> Any:
        if not isinstance(node, kind):
            return DESCEND
        found.update(node.shape[:1])
        return node

    map_nodes(look, tree)
    return sorted(found)


def count_samples(batch: Any, cure: str = "give it: accumulate(batch, loss_fn, samples=N)") -> int:
    """Find the number of samples of a batch: the first dimension of all of its tensors (but those without one).

    Where its lists have an item for each sample it is their length, and where there are arrays alone it is theirs.

    Args:
        batch: of any kind.
        cure: what the message advises.

    Raises:
        ApartError: where they disagree, or there is none.
    """
    listed = listed_samples(batch)
    if listed is not None:
        return listed
    rows = rows_of(batch) or rows_of(batch, np.ndarray)
    if len(rows) == 1:
        _check_images(batch, rows[0], cure)
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
    if not isinstance(images, (list, tuple)):
        return count_samples(images)
    is_one_each = isinstance(targets, (list, tuple, Tensor)) and len(targets) == len(images)
    return len(images) if is_one_each and len(rows_of((images, targets))) != 1 else count_samples((images, targets))


def _check_images(batch: Any, rows: int, cure: str) -> None:
    """Refuse a list of images where its length may be the number of samples: the first dimension is the channels'."""

    def look(node: Any) -> Any:
        if is_list_of_images(node) and len(node) != rows:
            raise ApartError(
                f"the batch ({type(batch).__name__}) has a list of {len(node)} tensors of the shape "
                f"{tuple(node[0].shape)}, which may be {len(node)} images or parts of {rows} samples; stack images to "
                f"one tensor, or {cure}."
            )
        return DESCEND

    map_nodes(look, batch)


def _listed(lengths: list[int]) -> str:
    return " and ".join([", ".join(map(str, lengths[:-1])), str(lengths[-1])])
