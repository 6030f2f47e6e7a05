"""What plots share, so that they can be read without colour."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

MARKERS, LINES = "os^DvPX*<>phd8", ("-", "--", "-.", ":")


def plain(text: str) -> str:
    """Text that a figure shows as it is: a dollar sign would begin mathematics, a first underscore hides a label."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def styles() -> Iterator[tuple[str, str]]:
    """(marker, line) for one curve after another, 56 of them unlike each other without their colours."""
    for number in itertools.count():
        yield MARKERS[number % len(MARKERS)], LINES[(number + number // len(MARKERS)) % len(LINES)]
