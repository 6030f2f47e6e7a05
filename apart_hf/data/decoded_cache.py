"""Decoded images on disk, so that a second run on the same images need not decode them."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL
from PIL import ImageFile, features
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from apart_hf.data import decoding, grey_levels
from apart_hf.data.packed import PackedTable
from apart_hf.data.splits import Split
from apart_hf.errors import first_line

_log = logging.getLogger(__name__)
_AT_ONCE = 5000  # rows that are hashed by one look-up
_SUFFIX, _PART = ".safetensors", ".part"
_OLD = 86400.0  # seconds after which a file that was not finished is removed
_CODECS = ("jpg", "jpg_2000", "zlib", "libtiff", "webp", "avif")


def cache_folder() -> Path:
    """Return the folder of decoded images, in the cache of the library `datasets`."""
    from datasets import config  # packed data do without this package

    return Path(config.HF_DATASETS_CACHE) / "apart_hf-decoded"


class DecodedCache:
    """Keeps the decoded images of splits as files that are written whole or not at all.

    A file is known by all that decides its bytes: every encoded image, the edge, the channels, the decoders and their
    versions. One that is damaged is not used. Where nothing can be written, one line says so, once.

    Args:
        folder: of the files; it is made where it is not there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._has_said = False

    def key(self, split: Split, edge: int, channels: int) -> str | None:
        """Hash what decides the decoded bytes; None: images are not encoded, or are not local."""
        if isinstance(split.data, PackedTable):
            return None
        found = _hash(_decoder())
        found.update(f"{edge} {channels} {len(split)}".encode())
        for cells in _encoded(split):
            for cell in cells:
                content = _identity(cell)
                if content is None:
                    return None
                found.update(len(content).to_bytes(8))
                found.update(content)
        return found.hexdigest()

    def load(self, key: str) -> tuple[Tensor, Tensor] | None:
        """Return what was saved under a key: images, and which were decoded; None: it is not there, or is damaged."""
        try:
            with safe_open(self._file(key), "pt") as file:
                # copies: a file in use may be replaced or removed
                decoded, good = (file.get_tensor(name).clone() for name in ("decoded", "good"))
                known = (file.metadata() or {}).get("checksum")
        except (OSError, SafetensorError):
            return None
        return (decoded, good) if known == _checksum(decoded, good) else None

    def save(self, key: str, decoded: Tensor, good: Tensor) -> None:
        """Keep images under a key, where that can be; another process may do the same at the same time."""
        temporary = self.folder / f".{key}-{secrets.token_hex(8)}{_PART}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            save_file({"decoded": decoded, "good": good}, temporary, {"checksum": _checksum(decoded, good)})
            os.replace(temporary, self._file(key))
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            self._say(error)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _remove_unfinished(self) -> None:
        """Remove what processes have left that were killed while they wrote."""
        for part in self.folder.glob(f".*{_PART}"):
            with contextlib.suppress(OSError):
                if part.stat().st_mtime < time.time() - _OLD:
                    part.unlink()

    def _say(self, error: Exception) -> None:
        if not self._has_said:
            _log.warning(
                f"warning: decoded images are not kept in {self.folder} ({first_line(error)}); the next run decodes "
                "them again. --no-decoded-cache does not try."
            )
        self._has_said = True


def _hash(content: bytes = b"") -> Any:
    import xxhash  # it comes with the package datasets

    return xxhash.xxh3_128(content)


def _decoder() -> bytes:
    """Describe what decodes: our own code, Pillow, and the libraries and switches that it reads images by."""
    sources = [Path(module.__file__ or "").read_bytes() for module in (decoding, grey_levels)]
    codecs = [f"{name} {features.version(name)}" for name in _CODECS if features.check(name)]
    heif = getattr(sys.modules.get("pillow_heif"), "__version__", None)
    switches = ImageFile.LOAD_TRUNCATED_IMAGES, PIL.Image.MAX_IMAGE_PIXELS, sys.warnoptions
    return repr([PIL.__version__, codecs, heif, switches, sources]).encode()


def _encoded(split: Split) -> Iterator[list[dict | None]]:
    """Give the cells of the images, many at a time, without their labels."""
    column = split.data.select_columns([split.input_key]).with_format("arrow")
    for start in range(0, len(split), _AT_ONCE):
        table = column[start : start + _AT_ONCE]
        yield table[split.input_key].to_pylist()


def _identity(cell: dict | None) -> bytes | None:
    """Return what tells one encoded image from another: its bytes, or its file's name, size and times.

    None: its file is not on this machine.
    """
    if cell is None:
        return b"none"
    if cell.get("bytes") is not None:
        return cell["bytes"]
    path = cell.get("path")
    if path is None:
        return b"none"
    from datasets.utils.file_utils import is_local_path

    if not is_local_path(path):
        return None
    try:
        found = os.stat(path)
    except OSError:
        return f"gone {path}".encode()
    return f"{path} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}".encode()


def _checksum(*tensors: Tensor) -> str:
    found = _hash()
    for tensor in tensors:
        found.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()
