"""A file of class names, one a line: --class-map."""

from __future__ import annotations

import re
from pathlib import Path

from apart_hf.data.class_order import class_name
from apart_hf.errors import ApartError

_NUMBERED = re.compile(r"(\d+)[\s,:]+(\S.*)")


def read_class_map(path: str, known: set[str] | None = None) -> tuple[str, ...]:
    """Read class names in the order of their indices: one a line, or an index and a name a line.

    Args:
        path: the file; a byte order mark is no part of it.
        known: the names of the classes in the data, by which "3 series" is told from class "series" of index 3.

    Raises:
        ApartError: where it cannot be read, or names a class or an index twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ApartError(f"--class-map {path}: cannot be read ({reason}).") from error
    names = [class_name(line.strip()) for line in text.splitlines() if line.strip()]
    if known is None or set(names) != known:
        names = _by_index(names)
    if not names or len(set(names)) < len(names):
        raise ApartError(f"--class-map {path}: needs class names, one a line, each once.")
    return tuple(names)


def _by_index(lines: list[str]) -> list[str]:
    """Sort lines of an index and a name, where all are that and the indices are 0 to K - 1; else they are names."""
    found = [_NUMBERED.fullmatch(line) for line in lines]
    numbered = {int(match[1]): match[2] for match in found if match is not None}
    if len(numbered) < len(lines) or set(numbered) != set(range(len(lines))):
        return lines
    return [numbered[index] for index in range(len(lines))]
