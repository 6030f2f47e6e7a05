"""From a row's encoded image to RGB pixels, and what is done with one that cannot be decoded."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import ExifTags
from PIL import Image as PIL
from PIL.TiffImagePlugin import TiffImageFile

from apart_hf.data.grey_levels import grey_levels
from apart_hf.errors import OneProcessError

IGNORED = -1  # class index of a row that stands for no image
# what PIL raises for damaged files, beside its own errors
_DAMAGE = (
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    struct.error,
    zlib.error,
    PIL.DecompressionBombError,
    Warning,  # where the user makes errors of them
)
_GONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# what makes an image upright, by its EXIF orientation
_TURNS = {
    2: PIL.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Transpose.ROTATE_180,
    4: PIL.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Transpose.TRANSPOSE,
    6: PIL.Transpose.ROTATE_270,
    7: PIL.Transpose.TRANSVERSE,
    8: PIL.Transpose.ROTATE_90,
}
_ACROSS = (5, 6, 7, 8)  # orientations that exchange width and height
_WIDTH, _HEIGHT = 256, 257  # tags of a TIFF file


class BadImage(ValueError):
    """One image cannot be decoded; the text says why."""


def rgb(encoded: dict[str, Any] | None) -> PIL.Image:
    """Decode a cell of an image column to RGB, upright.

    Grey, palette, CMYK and alpha images become RGB; grey ones of 16 or 32 bits as `grey_levels` says. The orientation
    that EXIF (or XMP) records is applied; where its block is damaged, the image is taken as it lies.

    Args:
        encoded: its file's bytes, or the path of it; or, under "pixels", (height, width, 3) uint8, as they are.

    Raises:
        BadImage: where it is damaged, too large (PIL's bound on decompression bombs), or not there.
        OSError: where its file cannot be read for other reasons (too many open files, a device that fails).
    """
    if encoded is not None and "pixels" in encoded:
        return PIL.fromarray(np.ascontiguousarray(encoded["pixels"]))
    with _damage_is_told(encoded):
        image = _opened(encoded or {}, load=True)
        turn = _TURNS.get(_orientation(image))
        if image.mode.startswith(("I", "F")):
            image = grey_levels(image)
        if image.mode != "RGB":
            image = image.convert("RGB")
        return image if turn is None else image.transpose(turn)


def upright_size(encoded: dict[str, Any] | None) -> tuple[int, int]:
    """Return (width, height) in pixels of what `rgb` gives, from the header alone.

    Raises:
        BadImage, OSError: as `rgb` does, as far as the header tells.
    """
    if encoded is not None and "pixels" in encoded:
        height, width, _ = encoded["pixels"].shape
        return width, height
    with _damage_is_told(encoded), _opened(encoded or {}) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # of which PIL tells the upright size, in some versions
            width, height = image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]
        return (height, width) if _orientation(image) in _ACROSS else (width, height)


@contextlib.contextmanager
def _damage_is_told(encoded: dict[str, Any] | None) -> Iterator[None]:
    """Make a `BadImage` of what is wrong with an image, and of nothing else."""
    if encoded is None or (encoded.get("bytes") is None and encoded.get("path") is None):
        raise BadImage("there is none")
    try:
        yield
    except BadImage:
        raise
    except (OSError, *_DAMAGE) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, _GONE):
            raise
        reason = str(error) or type(error).__name__
        if isinstance(error, PIL.UnidentifiedImageError):
            content = "" if encoded.get("bytes") is None else f": {_start(encoded['bytes'])}"
            reason = f"no image of a kind that Pillow reads{content}"
        raise BadImage(reason.rstrip(".")) from error


def _opened(encoded: dict[str, Any], load: bool = False) -> PIL.Image:
    """Read the header of an image, or all of it; a JPEG file that fails is tried again without its EXIF blocks."""
    from datasets.utils.file_utils import is_local_path  # which packed data do without

    path = encoded.get("path")
    try:
        if encoded["bytes"] is None and path is not None and is_local_path(path):
            return _read(path, load)
        return _read(io.BytesIO(_content(encoded)), load)
    except (OSError, *_DAMAGE):
        plain = _without_exif(_content(encoded))
        if plain is None:
            raise
        return _read(io.BytesIO(plain), load)


def _read(file: str | io.BytesIO, load: bool) -> PIL.Image:
    image = PIL.open(file)
    if load:
        image.load()  # and closes the file
    return image


def _content(encoded: dict[str, Any]) -> bytes:
    if encoded["bytes"] is not None:
        return encoded["bytes"]
    from datasets.utils.file_utils import xopen

    with xopen(encoded["path"], "rb") as file:  # also of the Hub
        return file.read()


def _without_exif(content: bytes) -> bytes | None:
    """Return a JPEG file without its EXIF blocks; None: it is none, or has none."""
    if not content.startswith(b"\xff\xd8"):
        return None
    kept, position = [content[:2]], 2
    while content[position : position + 1] == b"\xff" and content[position + 1 : position + 2] != b"\xda":  # pixels
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4])
        if content[position + 1 : position + 8] != b"\xe1" + content[position + 2 : position + 4] + b"Exif":
            kept.append(content[position:end])
        position = end
    plain = b"".join([*kept, content[position:]])
    return plain if len(plain) < len(content) else None


def _orientation(image: PIL.Image) -> int:
    """Return what EXIF says of how an image lies; 1, upright, where it says nothing or is damaged."""
    try:
        found = PIL.Image.getexif(image).get(ExifTags.Base.Orientation, 1)  # PNG's own would decode the pixels
        return found if found in _TURNS else 1
    except Exception:  # whatever PIL makes of a damaged block: the pixels are good
        return 1


def _start(content: bytes) -> str:
    return f"{len(content)} bytes that start with {content[:8]!r}"


def bad_image(place: str, error: Exception) -> OneProcessError:
    """Make the error for the image at `place`, for instance "image 3 of split 'train'"."""
    return OneProcessError(f"{place} cannot be decoded ({error}); replace it, or pass over such: --on-bad-image skip.")
