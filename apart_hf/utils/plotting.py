"""What plots share, so that they can be read without colour."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120
MARKERS, LINES = "os^DvPX*<>phd8", ("-", "--", "-.", ":")


def plain(text: str) -> str:
    """Mark up text so that a figure shows it as it is: a dollar sign would begin mathematics, an underscore hide it."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def shortened(text: str, length: int) -> str:
    """Mark up text as `plain` does, on one line and without its middle where it has more than `length` letters."""
    text = " ".join(text.split())
    if len(text) > length:
        begin = (length - 1) // 2
        text = f"{text[:begin]}…{text[len(text) - (length - 1 - begin) :]}"
    return plain(text)


def styles() -> Iterator[tuple[str, str]]:
    """Give (marker, line) for one curve after another, 56 of them unlike each other without their colours."""
    for number in itertools.count():
        yield MARKERS[number % len(MARKERS)], LINES[(number + number // len(MARKERS)) % len(LINES)]


def save(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure as PNG. Letters that the font lacks are boxes, of which nothing is said.

    Args:
        figure: what was drawn.
        path: the file to write.
        **options: further ones of `Figure.savefig`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(path, dpi=DPI, **options)
