"""Grey images of 16 and 32 bits, as files of microscopes, scanners and satellites are, in 8 bits."""

from __future__ import annotations

import numpy as np
from PIL import Image as PIL
from PIL.TiffImagePlugin import TiffImageFile

_OF_16_BITS = ("PNG", "PPM")  # formats that have no grey images of more bits
_FRACTIONS = ((0.0, 1.0), (-1.0, 1.0))  # (black, white)
_WHOLE = ((0, 2**8 - 1), (0, 2**16 - 1), (-(2**15), 2**15 - 1))
_SIGNED = ((0, 2**31 - 1), (-(2**31), 2**31 - 1))
_UNSIGNED = ((0, 2**32 - 1),)
_SHARE = 1 / 16  # of a range: what may lie outside, and what an image must span that is not simply of 8 or 16 bits
_SMALL = 8  # numbers with a fraction are no grey levels, where all are smaller
_SAMPLE_FORMAT, _IS_SIGNED = 339, 2  # a tag of TIFF


def grey_levels(image: PIL.Image) -> PIL.Image:
    """Turn an image of mode I;16, I or F to mode L, by a range of values that the image is taken to be of.

    PIL would cut off at 255. Which value is black and which is white is the file's where its format has 16 bits (mode
    I;16, PNG, PPM): 0 and 65,535. A file of 32 bits does not say it; it is the first of these ranges that holds all of
    its pixels, so that images of one kind are scaled alike, and none by its own darkest and brightest pixel:

    - of fractions (mode F): 0 to 1, -1 to 1, then those of whole numbers, by rounding. What lies outside by up to a
      sixteenth of the range, as after resampling, is cut off;
    - of whole numbers (mode I): 0 to 255, 0 to 65,535, -32,768 to 32,767, and those of 31 or 32 bits.

    An image with pixels below 0 or above 65,535 must span a sixteenth of its range, or next to nothing would be left.

    Args:
        image: loaded, as its file is.

    Raises:
        ValueError: where a pixel is no finite number, or no range fits; none fits fractions that all are below 8 and
            partly outside [-1, 1].
    """
    pixels = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _OF_16_BITS):
        levels = pixels >> 8
    elif image.mode == "F":
        levels = _of_fractions(pixels.astype(np.float64))
    else:
        is_unsigned = isinstance(image, TiffImageFile) and image.tag_v2.get(_SAMPLE_FORMAT, (1,))[0] != _IS_SIGNED
        levels = _of_whole((pixels.view(np.uint32) if is_unsigned else pixels).astype(np.int64), is_unsigned)
    return PIL.fromarray(levels.astype(np.uint8))


def _of_fractions(pixels: np.ndarray) -> np.ndarray:
    if not np.isfinite(pixels).all():
        raise ValueError(f"{(~np.isfinite(pixels)).sum()} of its {pixels.size} pixels are no finite numbers")
    for black, white in _FRACTIONS:
        if _holds(black, white, pixels, _SHARE):
            return np.rint((pixels.clip(black, white) - black) * (255 / (white - black)))
    whole, largest = np.rint(pixels), np.abs(pixels).max()
    if largest >= 2**31 or (largest < _SMALL and (whole != pixels).any()):
        raise _of_no_range(pixels)
    return _of_whole(whole.astype(np.int64), outside=_SHARE)


def _of_whole(pixels: np.ndarray, is_unsigned: bool = False, outside: float = 0.0) -> np.ndarray:
    for black, white in _WHOLE + (_UNSIGNED if is_unsigned else _SIGNED):
        is_plain = (black, white) in _WHOLE[:2]
        if not _holds(black, white, pixels, outside if is_plain else 0.0):
            continue
        spans = int(pixels.max()) - int(pixels.min()) >= _SHARE * (white - black)
        if spans or (is_plain and _holds(black, white, pixels)):
            return (pixels.clip(black, white) - black) * 256 // (white - black + 1)
    raise _of_no_range(pixels)


def _holds(black: float, white: float, pixels: np.ndarray, outside: float = 0.0) -> bool:
    margin = outside * (white - black)
    return bool(black - margin <= pixels.min() and pixels.max() <= white + margin)


def _of_no_range(pixels: np.ndarray) -> ValueError:
    return ValueError(
        f"its pixels of 32 bits are {pixels.min():g} to {pixels.max():g}, and it is not known which value is black and "
        "which is white; save it with 8 or 16 bits, or with 0 as black and 1 as white"
    )
