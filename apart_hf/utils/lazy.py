"""Exports of a package that are imported at their first use, so that what is light does not wait for what is heavy."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a package (PEP 562), which imports an exported name when it is first asked for.

    Args:
        package: `__name__` of the package.
        modules: the module, within the package, that defines each exported name.

    Returns:
        The function to assign to `__getattr__`, hidden from type checkers, which would take it for any name.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)  # the next use finds it there
        return value

    return get
