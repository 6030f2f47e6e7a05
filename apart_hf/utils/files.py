"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from apart_hf.errors import ApartError


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: whatever happens, it holds the old text or the new one."""
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def flush(path: Path) -> None:
    """Write a file or folder through to the disk, so that a rename never precedes what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what cannot be written within the block into an ApartError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ApartError(
            f"cannot write {folder} ({' '.join(str(error).split())}); make room there, then go on from the last "
            "checkpoint by --resume auto."
        ) from error


def sha256(file: Path) -> str:
    """Compute the checksum of a file, in hexadecimal."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
