"""The hyper-parameters of a strategy, as a dict to read."""

from __future__ import annotations

from typing import Any, NoReturn

from apart_hf.errors import ApartError


class HyperParameters(dict[str, Any]):
    """The hyper-parameters of a strategy, to read: `strategy.set` changes them."""

    def _refused(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ApartError(
            "hyper-parameters are read here; change them by strategy.set(epsilon=0.05), between two steps."
        )

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refused

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)
