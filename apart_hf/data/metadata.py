"""Labels of images that a file beside them tells: metadata.csv or metadata.jsonl, with file_name and a label."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apart_hf.data.tree import Folder
from apart_hf.errors import ApartError

FILES = ("metadata.csv", "metadata.jsonl")
TARGET_NAMES = ("label", "labels", "target", "class", "class_id", "fine_label", "cls")


@dataclass(frozen=True)
class Metadata:
    """Holds what such a file says.

    Args:
        inside: its path within the data.
        paths: of the images it names, in their order.
        labels: of these images: class names, or integers.
    """

    inside: str
    paths: list[str]
    labels: list[str] | list[int]


def has_metadata(folder: Folder) -> bool:
    """Tell whether a file in a folder tells labels."""
    return _find(folder) is not None


def _find(folder: Folder) -> tuple[str, str] | None:
    """Return the name of the file in a folder that tells labels, and its column of them."""
    for name in FILES:
        key = _target(_first(f"{folder.path}/{name}")) if name in folder.others else None
        if key is not None:
            return name, key
    return None


def read_metadata(folder: Folder) -> Metadata | None:
    """Read the labels that a file in a folder tells; None: there is none that does.

    Raises:
        ApartError: where it cannot be read, a label is missing, or an image is not there.
    """
    there = _find(folder)
    if there is None:
        return None
    name, key = there
    file, inside = f"{folder.path}/{name}", f"{folder.inside}{name}"
    rows = _rows(file)
    found: dict[str, Any] = {}
    for number, row in enumerate(rows, 1):
        image, label = row.get("file_name"), row.get(key)
        if not image or label in (None, ""):
            raise ApartError(f"{file}: row {number} has no {key if image else 'file_name'}; fill it in, or remove it.")
        path = f"{folder.path}/{image}"
        if not Path(path).is_file():
            raise ApartError(f"{file}: row {number} names {image}, which is not there; correct it, or remove it.")
        found[path] = label
    paths = sorted(found)
    texts = [str(found[path]) for path in paths]
    numbers = all(text.lstrip("-").isdecimal() for text in texts)
    return Metadata(inside, paths, [int(text) for text in texts] if numbers else texts)


def _target(row: dict[str, Any]) -> str | None:
    """Name the column of the labels."""
    return next((name for name in TARGET_NAMES if name in row), None) if "file_name" in row else None


def _rows(file: str, most: int | None = None) -> list[dict[str, Any]]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            if file.endswith(".csv"):
                source: Any = csv.DictReader(lines)
            else:
                source = (json.loads(line) for line in lines if line.strip())
            rows = []
            for row in source:
                if not isinstance(row, dict):
                    raise ValueError(f"{row!r} is no table of columns")
                rows.append(row)
                if len(rows) == most:
                    break
            return rows
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ApartError(f"{file} cannot be read ({reason}); correct it, or remove it.") from error


def _first(file: str) -> dict[str, Any]:
    rows = _rows(file, 1)
    return rows[0] if rows else {}
