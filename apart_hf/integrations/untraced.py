"""The user's code is called twice in a step; the second call leaves no trace on the object that it is a method of.

Loops count and collect in the method that computes the loss: metrics, lists of outputs. The perturbed pass is none of
what they count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from torch import Tensor, nn

from apart_hf.integrations.restored import children_of, length_of, restores_of

_OWN = frozenset(vars(nn.Module()))  # parameters, buffers, hooks: whoever changes these in a pass restores them
_LONG = 10_000  # items; a longer container is looked into only where the first call has changed its length


class Traces:
    """Keeps all calls in a step but the first from the attributes that count and collect.

    Attributes are set back to what they were, numbers and all, those of modules within the owners, too. In place are
    set back tensors that the first call has changed, arrays, lists, sets, deques and dicts, and what such containers
    hold. What objects of other classes hold is theirs.

    Args:
        owners: of the attributes, as they are before the first call.
    """

    def __init__(self, owners: Iterable[Any]):
        self._owners: list[Any] = []
        self._calls = 0
        # with the value itself: an id is that of one that lives
        self._marks: dict[int, tuple[int | None, Any]] = {}
        self._known: set[int] = set()
        for owner in owners:
            self._own(owner)

    def _own(self, owner: Any) -> None:
        """Take an owner, the modules within it, and those that its attributes hold."""
        for one in owner.modules() if isinstance(owner, nn.Module) else (owner,):
            if id(one) not in self._known:
                self._known.add(id(one))
                self._owners.append(one)
                for value in _attributes(one).values():
                    self._look(value)

    def _look(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._own(value)
        length = length_of(value)
        is_container = length is not None or children_of(value)
        if (is_container or isinstance(value, Tensor)) and id(value) not in self._marks:
            self._marks[id(value)] = (_mark(value), value)
            for child in children_of(value) if (length or 0) <= _LONG else ():
                self._look(child)

    def _is_as_before(self, value: Any) -> bool:
        return id(value) in self._marks and self._marks[id(value)][0] == _mark(value)

    @contextmanager
    def of_a_call(self) -> Iterator[bool]:
        """Surround a call. What is given tells whether it is the first; what further ones do is undone at their end."""
        self._calls += 1
        with nullcontext() if self._calls == 1 else self._undone():
            yield self._calls == 1

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Undo at the end what the block does to the attributes."""
        attributes = [(owner, _attributes(owner)) for owner in self._owners]
        restores: list[Callable[[], None]] = []
        seen: set[int] = set()
        for _, before in attributes:
            for value in before.values():
                self._collect(value, restores, seen)
        try:
            yield
        finally:
            for owner, before in attributes:
                for key in [key for key in vars(owner) if key not in before and key not in _OWN]:
                    del vars(owner)[key]
                vars(owner).update(before)
            for restore in restores:
                restore()

    def _collect(self, value: Any, restores: list[Callable[[], None]], seen: set[int]) -> None:
        """Collect what sets a value back, and what it holds."""
        is_tensor, length = isinstance(value, Tensor), length_of(value)
        if (is_tensor or (length or 0) > _LONG) and self._is_as_before(value):
            return
        if is_tensor or isinstance(value, np.ndarray) or length is not None or children_of(value):
            if id(value) in seen:
                return
            seen.add(id(value))
        restores += restores_of(value)
        for child in children_of(value):
            if not ((length or 0) > _LONG and isinstance(child, Tensor)):  # results of all steps, say
                self._collect(child, restores, seen)


def _attributes(owner: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(owner).items() if key not in _OWN}


def _mark(value: Any) -> int | None:
    """Tell what changes when a value is changed in place."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    return length_of(value)
