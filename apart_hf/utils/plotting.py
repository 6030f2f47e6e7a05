"""What plots share, so that they can be read without colour."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

MARKERS, LINES = "os^DvPX*<>phd8", ("-", "--", "-.", ":")


def plain(text: str) -> str:
    """Mark up text so that a figure shows it as it is: a dollar sign would begin mathematics, an underscore hide it."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def styles() -> Iterator[tuple[str, str]]:
    """Give (marker, line) for one curve after another, 56 of them unlike each other without their colours."""
    for number in itertools.count():
        yield MARKERS[number % len(MARKERS)], LINES[(number + number // len(MARKERS)) % len(LINES)]
