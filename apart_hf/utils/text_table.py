"""Tables of aligned text, for terminals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def text_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Align rows under the names of their columns; numbers stand at the right, what is None stays empty.

    Args:
        rows: the values of each row by column; all rows have the same columns.

    Returns:
        A line for the columns, a line for each row, and no blanks at the ends of lines.
    """
    columns = list(rows[0]) if rows else []
    cells = [[_text(row[column]) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[place]) for line in cells)) for place, column in enumerate(columns)]
    right = [all(isinstance(row[column], (int, float, type(None))) for row in rows) for column in columns]
    lines = [
        "  ".join(
            text.rjust(width) if numbers else text.ljust(width) for text, width, numbers in zip(line, widths, right)
        )
        for line in [columns, *cells]
    ]
    return "\n".join(line.rstrip() for line in lines)


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
