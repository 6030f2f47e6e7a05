"""Tables of aligned text, for terminals and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def text_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Align rows under the names of their columns; numbers stand at the right, what is None stays empty.

    Args:
        rows: the values of each row by column; all rows have the same columns.

    Returns:
        A line for the columns, a line for each row, and no blanks at the ends of lines.
    """
    return "\n".join("  ".join(cells).rstrip() for cells in _aligned(rows)[0])


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Write rows as a table of Markdown that is aligned as text, too, see `text_table`.

    Returns:
        A line for the columns, one of dashes, and a line for each row.
    """
    (head, *lines), right = _aligned([{_cell(key): _cell(value) for key, value in row.items()} for row in rows])
    dashes = [f"{'-' * (len(name) - 1)}{':' if numbers else '-'}" for name, numbers in zip(head, right)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, dashes, *lines))


def _cell(value: Any) -> Any:
    return value.replace("|", r"\|") if isinstance(value, str) else value


def _aligned(rows: Sequence[Mapping[str, object]]) -> tuple[list[list[str]], list[bool]]:
    """Return the cells of each line, of equal widths, and which columns are of numbers."""
    columns = list(rows[0]) if rows else []
    cells = [[_text(row[column]) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[place]) for line in cells)) for place, column in enumerate(columns)]
    right = [all(isinstance(row[column], (int, float, type(None))) for row in rows) for column in columns]
    lines = [
        [text.rjust(width) if numbers else text.ljust(width) for text, width, numbers in zip(line, widths, right)]
        for line in ([columns, *cells] if rows else [])
    ]
    return lines, right


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
