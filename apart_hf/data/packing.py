"""Writes a dataset in the form that `packed` reads: every image decoded, of one size."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as PIL
from PIL import ImageOps

from apart_hf.data.loading import ImageData
from apart_hf.data.packed import CLASSES, IMAGES, LABELS
from apart_hf.data.split_names import meaning
from apart_hf.data.splits import Split
from apart_hf.errors import ApartError
from apart_hf.utils.progress_bar import progress_bar

PART = 60_000_000  # bytes that a file of images stays below
_HEADER = 1_000  # bytes of it, at most
_AT_ONCE = 100  # images that are looked up together


@dataclass(frozen=True)
class PackedSplit:
    """Says what was written of a split.

    Args:
        name: of its folder.
        images: how many.
        size: (width, height) in pixels.
        parts: files of images.
        bytes: of all its files.
        skipped: images that could not be decoded, and were left out.
    """

    name: str
    images: int
    size: tuple[int, int]
    parts: int
    bytes: int
    skipped: int


def pack(data: ImageData, folder: Path, *, size: int | None = None, skip_bad: bool = False) -> list[PackedSplit]:
    """Write the splits of a dataset as arrays of decoded images.

    Args:
        data: what is written; its classes keep their order.
        folder: appears whole or not at all.
        size: edge in pixels of a square that is cut from the middle of every image and resized; None: images keep
            their size, which must be one.
        skip_bad: leave out what cannot be decoded.

    Raises:
        ApartError: where the folder is there or cannot be made, images differ in size, or one cannot be decoded.
    """
    if folder.exists():
        raise ApartError(f"{folder} exists already; name another folder, or remove it.")
    if strange := [name for name in data.class_names if name.splitlines() != [name]]:
        raise ApartError(f"the class name {strange[0]!r} is no line of text; give class names by --class-map.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    except OSError as error:
        raise ApartError(f"cannot write {folder}: {error.strerror}; choose another folder.") from error
    try:
        temporary.chmod(0o755)
        (temporary / CLASSES).write_text("".join(f"{name}\n" for name in data.class_names), encoding="utf-8")
        found = [_write(split, temporary / name, size, skip_bad) for name, split in _named(data).items()]
        temporary.rename(folder)
    except OSError as error:
        raise ApartError(f"cannot write {folder}: {error.strerror or error}; make room, or choose another.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


def _named(data: ImageData) -> dict[str, Split]:
    """Return the splits by names under which they are found again without being named."""
    train = data.train.name if meaning(data.train.name) else "train"
    evaluated = [("validation", data.val), ("test", data.test)]
    found = {train: data.train}
    for usual, split in evaluated:
        if split is not None:
            found[split.name if meaning(split.name) and split.name not in found else usual] = split
    return found


def _write(split: Split, folder: Path, size: int | None, skip_bad: bool) -> PackedSplit:
    folder.mkdir()
    kept: list[int] = []
    part: np.ndarray | None = None
    parts = filled = 0
    for index, image in _images(split, size, skip_bad):
        pixels = np.asarray(image)
        if part is None:
            part = np.empty((max(1, (PART - _HEADER) // pixels.nbytes), *pixels.shape), dtype=np.uint8)
            if part[0].nbytes > PART - _HEADER:
                raise ApartError(
                    f"{split.place(index)} has {image.width}x{image.height} pixels, more than a file of {PART:,} bytes "
                    "holds; --size N cuts a square from the middle of every image and resizes it to N pixels."
                )
        if pixels.shape != part.shape[1:]:
            raise ApartError(
                f"{split.place(index)} has {image.width}x{image.height} pixels, the ones before it "
                f"{part.shape[2]}x{part.shape[1]}; packed images have one size: --size N cuts a square from the middle "
                "of every image and resizes it to N pixels."
            )
        part[filled] = pixels
        kept.append(index)
        filled += 1
        if filled == len(part):
            np.save(folder / IMAGES.format(parts), part)
            parts, filled = parts + 1, 0
    if part is None:
        raise ApartError(f"no image of split {split.name!r} can be decoded.")
    if filled:
        np.save(folder / IMAGES.format(parts), part[:filled])
        parts += 1
    np.save(folder / LABELS, split.labels()[kept].astype(np.int64))
    written = sum(file.stat().st_size for file in folder.iterdir())
    return PackedSplit(folder.name, len(kept), (part.shape[2], part.shape[1]), parts, written, len(split) - len(kept))


def _images(split: Split, size: int | None, skip_bad: bool) -> Iterator[tuple[int, PIL.Image]]:
    """Give the images of a split that can be decoded, with their positions."""
    for start in progress_bar(range(0, len(split), _AT_ONCE), f"packing split {split.name}", unit=f"{_AT_ONCE} images"):
        indices = list(range(start, min(start + _AT_ONCE, len(split))))
        for index, image, _ in split.images(indices, skip_bad=skip_bad):
            yield index, image if size is None else ImageOps.fit(image, (size, size), PIL.Resampling.BICUBIC)
