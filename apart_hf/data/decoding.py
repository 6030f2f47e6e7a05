"""From a row's encoded image to RGB pixels, and what is done with one that cannot be decoded."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from datasets import Image
from PIL import Image as PIL

from apart_hf.errors import OneProcessError

IGNORED = -1  # class index of a row that stands for no image
_FEATURE = Image()
# what PIL raises for damaged files, beside its own errors
_DAMAGE = (
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    RuntimeError,
    struct.error,
    zlib.error,
    PIL.DecompressionBombError,
)


class BadImage(ValueError):
    """One image cannot be decoded; the text says why."""


def rgb(encoded: dict[str, Any] | None) -> PIL.Image:
    """Decode a cell of an image column; grey (also of 16 bits), palette, CMYK and alpha become RGB.

    Raises:
        BadImage: where it is damaged, or not there.
        OSError: where its file cannot be read for other reasons (too many open files, a device that fails).
    """
    if encoded is None:
        raise BadImage("there is none")
    try:
        image = _FEATURE.decode_example(encoded)
        if image.mode.startswith("I;16"):  # PIL would cut off at 255
            image = PIL.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except (OSError, *_DAMAGE) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise
        reason = str(error) or type(error).__name__
        if isinstance(error, PIL.UnidentifiedImageError):
            reason = "no image file" if encoded.get("bytes") is None else f"no image: {_start(encoded['bytes'])}"
        raise BadImage(reason.rstrip(".")) from error


def _start(content: bytes) -> str:
    return f"{len(content)} bytes that start with {io.BytesIO(content).read(8)!r}"


def bad_image(place: str, error: Exception) -> OneProcessError:
    """Make the error for the image at `place`, for instance "image 3 of split 'train'"."""
    return OneProcessError(f"{place} cannot be decoded ({error}); replace it, or pass over such: --on-bad-image skip.")
