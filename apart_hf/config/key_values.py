"""Arguments given as KEY=VALUE: those of timm's factories, and hyper-parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from apart_hf.errors import ApartError


def key_values(pairs: Iterable[str] | None) -> dict[str, Any]:
    """Read KEY=VALUE as timm does: values are Python literals, else text."""
    found = {}
    for pair in pairs or ():
        key, _, value = pair.partition("=")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # the latter two of too deep a nesting
            found[key] = value
    return found


def check_key_values(flag: str, pairs: Iterable[str] | None, example: str) -> None:
    """Raise ApartError for the first of some texts that is not KEY=VALUE."""
    for pair in pairs or ():
        if not pair.partition("=")[0].isidentifier() or "=" not in pair:
            raise ApartError(f"{flag} {pair!r}: needs KEY=VALUE, for instance {example}.")
