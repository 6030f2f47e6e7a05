"""The user's code is called twice in a step; the second call leaves no trace on the object that it is a method of.

Loops count and collect in the method that computes the loss: metrics, lists of outputs. The perturbed pass is none of
what they count.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

_OWN = frozenset(vars(nn.Module()))  # parameters, buffers, hooks: whoever changes these in a pass restores them
_LONG = 10_000  # items; a longer container is looked into only where the first call has changed its length


class Traces:
    """Keeps all calls in a step but the first from the attributes that count and collect.

    Attributes are set back to what they were, numbers and all. In place are set back tensors that the first call has
    changed, lists, sets, deques and dicts, with the containers that a dict holds. What other objects hold is theirs.

    Args:
        owners: of the attributes, as they are before the first call.
    """

    def __init__(self, owners: Iterable[Any]):
        self._owners = list(owners)
        self._calls = 0
        # with the value itself: an id is that of one that lives
        self._marks = {
            id(value): (_mark(value), value) for _, before in self._attributes() for value in before.values()
        }

    def _attributes(self) -> list[tuple[Any, dict[str, Any]]]:
        return [(owner, {k: v for k, v in vars(owner).items() if k not in _OWN}) for owner in self._owners]

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
        attributes = self._attributes()
        restores = [self._restore_of(value) for _, before in attributes for value in before.values()]
        try:
            yield
        finally:
            for owner, before in attributes:
                for key in [key for key in vars(owner) if key not in before and key not in _OWN]:
                    del vars(owner)[key]
                vars(owner).update(before)
            for restore in restores:
                if restore is not None:
                    restore()

    def _restore_of(self, value: Any) -> Callable[[], None] | None:
        """Make what sets a value back in place; None: it cannot change, or is left alone."""
        if isinstance(value, Tensor):
            return None if self._is_as_before(value) else _restore_tensor(value)
        if isinstance(value, (dict, list, deque, set)):
            return None if len(value) > _LONG and self._is_as_before(value) else _restore_container(value)
        return None


def _mark(value: Any) -> int | None:
    """Tell what changes when a value is changed in place."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    return len(value) if isinstance(value, (dict, list, deque, set)) else None


def _restore_tensor(value: Tensor) -> Callable[[], None]:
    data, kept = value.detach(), value.detach().clone()

    def restore() -> None:
        data.copy_(kept)

    return restore


def _restore_container(value: Any) -> Callable[[], None]:
    items, inner = list(value.items() if isinstance(value, dict) else value), []
    if isinstance(value, dict):
        inner = [_restore_container(item) for _, item in items if isinstance(item, (dict, list, deque, set))]

    def restore() -> None:
        value.clear()
        value.extend(items) if isinstance(value, (list, deque)) else value.update(items)
        for one in inner:
            one()

    return restore
