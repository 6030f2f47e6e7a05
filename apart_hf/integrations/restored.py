"""Values that are changed in place, and what sets each back: tensors, arrays, containers of Python and their kinds.

Methods of the kinds themselves are called, since a subclass may have others of that name: `Counter.update` counts, and
outputs of transformers refuse it.
"""

from __future__ import annotations

import array
from collections import ChainMap, OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

LARGE = 2**24  # bytes of an array, up to which it is copied: nothing tells whether it was changed
_WRAPPERS = (UserList, UserDict, ChainMap)  # what they hold is an attribute of theirs


def children_of(value: Any) -> Iterable[Any]:
    """Give what a container holds; nothing for any other value."""
    if isinstance(value, dict):
        return dict.values(value)
    if isinstance(value, _WRAPPERS):
        return vars(value).values()
    return value if isinstance(value, (list, tuple, deque, set)) else ()


def length_of(value: Any) -> int | None:
    """Count what a container holds; None for any other value."""
    return len(value) if isinstance(value, (dict, list, tuple, deque, set)) else None


def restores_of(value: Any) -> list[Callable[[], None]]:
    """Make what sets a value back in place, but not what it holds; nothing where it cannot change, or is left alone."""
    if isinstance(value, Tensor):
        return [partial(_put_tensor, value.detach(), value.detach().clone())]
    if isinstance(value, np.ndarray):
        copied = value.nbytes <= LARGE and value.flags.writeable
        return [partial(np.copyto, value, value.copy())] if copied else []
    own = [(put, copy(value)) for kind, copy, put in _KINDS if isinstance(value, kind)][:1]
    restores: list[Callable[[], None]] = [partial(put, value, kept) for put, kept in own]
    attributes = getattr(value, "__dict__", None)
    if attributes is not None and (own or isinstance(value, _WRAPPERS)):
        restores.append(partial(_put_dict, attributes, list(attributes.items())))
    return restores


def _put_tensor(value: Tensor, kept: Tensor) -> None:
    value.copy_(kept)


def _put_dict(value: dict[Any, Any], kept: list[tuple[Any, Any]]) -> None:
    base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    now = base.items(value)
    if len(now) != len(kept) or any(a is not c or b is not d for (a, b), (c, d) in zip(now, kept)):
        base.clear(value)
        for key, item in kept:
            base.__setitem__(value, key, item)


def _items(value: dict[Any, Any]) -> list[tuple[Any, Any]]:
    return list(OrderedDict.items(value) if isinstance(value, OrderedDict) else dict.items(value))


def _put_list(value: list[Any], kept: list[Any]) -> None:
    list.__setitem__(value, slice(None), kept)


def _put_deque(value: deque[Any], kept: list[Any]) -> None:
    deque.clear(value)
    deque.extend(value, kept)


def _put_set(value: set[Any], kept: set[Any]) -> None:
    set.clear(value)
    set.update(value, kept)


def _put_numbers(value: Any, kept: Any) -> None:
    value[:] = kept


def _whole(value: Any) -> Any:
    return value[:]


_KINDS: list[tuple[Any, Callable[[Any], Any], Callable[[Any, Any], None]]] = [
    (dict, _items, _put_dict),
    (list, list, _put_list),
    (deque, list, _put_deque),
    (set, set, _put_set),
    ((bytearray, array.array), _whole, _put_numbers),
]
