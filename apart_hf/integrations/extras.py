"""Libraries that come with an extra of this package: one line where they are absent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from apart_hf.errors import ApartError


class MissingExtra(ApartError, ImportError):
    """Tells that a library is not installed, which an extra of this package brings."""


@contextmanager
def brought_by(extra: str, *libraries: str) -> Iterator[None]:
    """Import within this block what the extra brings.

    Args:
        extra: its name in setup.cfg.
        *libraries: their names in Python.

    Raises:
        MissingExtra: where one of them is absent. What is absent beside them keeps its error.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in libraries:
            raise
        raise MissingExtra(f"{name} is not installed; pip install 'apart-hf[{extra}]'.") from None
