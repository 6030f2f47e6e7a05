"""Accuracy by class, as a run leaves it, and what the card shows of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from apart_hf.hub.training_record import Claim

NUMBERS, PICTURE = "plots/classes.json", "plots/confusion.png"
SHOWN = 20  # classes that a card has room for


def shown_by_class(folder: Path, results: Claim | None) -> list[dict[str, Any]] | None:
    """Return the rows of a card's table: class, images and accuracy in per cent, which is None without an image.

    Args:
        folder: of a run, or of what is published of it.
        results: what is claimed of the weights.

    Returns:
        The rows; None: there are none, too many, or they are of other weights or images than the claim.
    """
    try:
        found = json.loads((folder / NUMBERS).read_text())
        is_of = (found["split"], found["epoch"], found["images"])
        rows = [{key: row[key] for key in ("class", "images", "accuracy")} for row in found["classes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if results is None or is_of != (results.split, results.epoch, results.images or found["images"]):
        return None
    return [row | {"class": _in_a_cell(str(row["class"]))} for row in rows] if len(rows) <= SHOWN else None


def _in_a_cell(text: str) -> str:
    """Write text so that it stays within a cell of a table in Markdown."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
