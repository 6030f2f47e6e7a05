"""Packed datasets: images and labels as plain arrays, which numpy alone reads. `apart-hf pack` makes them.

    OUT/classes.txt           class names, one a line, in the order of their indices
    OUT/train/images-0.npy    (N, height, width, 3) uint8, RGB; and images-1.npy, ... in order
    OUT/train/labels.npy      (sum of N,) integers, class indices

and the same for each other split, in a folder of its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apart_hf.data.split_names import in_usual_order
from apart_hf.errors import ApartError

CLASSES, LABELS, IMAGES = "classes.txt", "labels.npy", "images-{}.npy"
INPUT_KEY, TARGET_KEY = "image", "label"
_IMAGES = re.compile(r"images-[0-9]+\.npy")
_AGAIN = "pack the data again"


@dataclass(frozen=True)
class ClassNames:
    """Says, of a column of class indices, what the classes are called.

    Args:
        names: by class index.
    """

    names: list[str]


class PackedTable:
    """Holds rows of (image, class index) with what splits ask of a table.

    Args:
        parts: of the images, in order; they stay on the disk until they are asked for.
        files: that the parts are from.
        labels: class index of each row.
        names: of the classes.
        rows: which of the rows of all parts these are.
    """

    def __init__(
        self, parts: Sequence[np.ndarray], files: Sequence[Path], labels: np.ndarray, names: list[str], rows: np.ndarray
    ):
        self._parts, self._files, self._all_labels, self._rows = parts, files, labels, rows
        self._starts = np.cumsum([0, *map(len, parts)])
        self.features = {INPUT_KEY: None, TARGET_KEY: ClassNames(names)}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def labels(self) -> np.ndarray:
        """Return the class indices (rows,) int64."""
        return self._all_labels[self._rows]

    def select(self, indices: np.ndarray) -> PackedTable:
        """Return these rows alone."""
        names = self.features[TARGET_KEY]
        assert names is not None
        return PackedTable(self._parts, self._files, self._all_labels, names.names, self._rows[indices])

    def __getitem__(self, indices: int | list[int]) -> dict[str, Any]:
        """Return a row, or columns of several rows; an image is {"pixels", "bytes": None, "path": FILE[ROW]}."""
        if isinstance(indices, int):
            return {key: column[0] for key, column in self[[indices]].items()}
        rows = self._rows[indices].tolist()
        return {INPUT_KEY: [self._cell(row) for row in rows], TARGET_KEY: self._all_labels[rows].tolist()}

    def _cell(self, row: int) -> dict[str, Any]:
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        place = row - int(self._starts[part])
        return {"pixels": self._parts[part][place], "bytes": None, "path": f"{self._files[part]}[{place}]"}


class PackedFolder:
    """Finds the splits of a packed dataset, and opens them.

    Args:
        path: of the folder.

    Raises:
        ApartError: where its class names cannot be read.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self.notes: list[str] = []
        self.timm: str | None = None
        self.labels_from: str | None = None
        self.seen: str | None = None
        self.class_names = _class_names(self.path / CLASSES)

    @classmethod
    def find(cls, path: str) -> PackedFolder | None:
        """Open a folder, unless it is no packed dataset."""
        return cls(path) if _splits(Path(path)) else None

    @property
    def splits(self) -> list[str]:
        """Return the names of the splits."""
        return in_usual_order(_splits(self.path))

    def load(self, names: Iterable[str]) -> dict[str, PackedTable]:
        """Open these splits.

        Raises:
            ApartError: naming the file that is missing or is not as it should be.
        """
        return {name: self._split(self.path / name) for name in names}

    def _split(self, folder: Path) -> PackedTable:
        labels = self._labels(folder / LABELS)
        parts: list[np.ndarray] = []
        files: list[Path] = []
        while sum(map(len, parts)) < len(labels):
            files.append(folder / IMAGES.format(len(parts)))
            parts.append(self._images(files[-1], parts, len(labels)))
        found = sum(map(len, parts))
        more = folder / IMAGES.format(len(parts))
        if found > len(labels) or more.exists():
            found += len(_array(more)) if found == len(labels) else 0
            raise ApartError(
                f"{folder / LABELS} has {len(labels)} labels, and the parts beside it hold {found} images or more; "
                f"{_AGAIN}."
            )
        return PackedTable(parts, files, labels, self.class_names, np.arange(len(labels)))

    def _labels(self, file: Path) -> np.ndarray:
        labels = _array(file)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
            raise ApartError(f"{file} has {_form(labels)}, and should have (N,) class indices, integers; {_AGAIN}.")
        bad = np.flatnonzero((labels < 0) | (labels >= len(self.class_names)))
        if len(bad):
            raise ApartError(
                f"{file}: {len(bad)} labels are outside 0..{len(self.class_names) - 1}, the classes of {CLASSES}; the "
                f"first is {labels[bad[0]]}, at {bad[0]}; {_AGAIN}."
            )
        return labels.astype(np.int64)

    def _images(self, file: Path, before: Sequence[np.ndarray], wanted: int) -> np.ndarray:
        if before and not file.exists():
            found = sum(map(len, before))
            raise ApartError(
                f"{file} is missing: {LABELS} has {wanted} labels, and the parts before it {found} images."
            )
        images = _array(file)
        size = before[0].shape[1:] if before else images.shape[1:]
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] != 3 or images.shape[1:] != size:
            like = f", with {size[1]}x{size[0]} pixels as the parts before it" if before else ""
            raise ApartError(
                f"{file} has {_form(images)}, and should have (N, height, width, 3) uint8{like}; {_AGAIN}."
            )
        return images


def _splits(path: Path) -> list[str]:
    """List the folders directly in a folder that hold a packed split."""
    try:
        has_classes = (path / CLASSES).is_file()
        found = {one.name: {file.name for file in one.iterdir()} for one in path.iterdir() if one.is_dir()}
    except (OSError, ValueError):  # the second of a name with a null byte
        return []
    return [
        name
        for name, files in found.items()
        if any(_IMAGES.fullmatch(file) for file in files) or (has_classes and LABELS in files)
    ]


def _class_names(file: Path) -> list[str]:
    try:
        names = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ApartError(
            f"{file} cannot be read ({reason}): it holds the class names, one a line; {_AGAIN}."
        ) from error
    if len(set(names)) < len(names) or "" in names:
        raise ApartError(f"{file} needs class names, one a line, each once; {_AGAIN}.")
    return names


def _array(file: Path) -> np.ndarray:
    """Open an array, which stays on the disk."""
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0].rstrip(".")
        raise ApartError(f"{file} cannot be read ({reason}); {_AGAIN}.") from error


def _form(array: np.ndarray) -> str:
    return f"{array.shape} {array.dtype}"
