"""Grey images of 16 and 32 bits keep what they show: each range of values against numpy, and what has none is named."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PIL

from apart_hf.data.decoding import BadImage, rgb

RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def decoded(pixels, kind="TIFF", mode=None):
    """The levels that an image of these pixels gets, and the mode that Pillow opens it in."""
    file = io.BytesIO()
    PIL.fromarray(pixels).save(file, kind)
    with PIL.open(file) as image:
        opened = image.mode
    found = np.asarray(rgb({"bytes": file.getvalue(), "path": None}))
    assert (found == found[..., :1]).all()  # grey
    return found[..., 0].astype(int), opened


@pytest.mark.parametrize(
    "pixels, want, mode",
    [
        (np.round(RAMP * 255).astype(np.int32), np.round(RAMP * 255), "I"),
        (np.round(RAMP * 65535).astype(np.int32), np.round(RAMP * 65535) // 256, "I"),
        (np.round(RAMP * 65535 - 32768).astype(np.int32), np.round(RAMP * 65535) // 256, "I"),
        (np.round(RAMP * (2**31 - 1)).astype(np.int32), np.round(RAMP * (2**31 - 1)) // 2**23, "I"),
        (np.round(RAMP * (2**32 - 1) - 2**31).astype(np.int32), np.round(RAMP * (2**32 - 1)) // 2**24, "I"),
        (RAMP.astype(np.float32), np.round(RAMP * 255), "F"),
        ((RAMP * 2 - 1).astype(np.float32), np.round(RAMP * 255), "F"),
        ((RAMP * 255).astype(np.float32), np.round(RAMP * 255), "F"),
        (np.round(RAMP * 65535).astype(np.float32), np.round(RAMP * 65535) // 256, "F"),
        ((RAMP * 1.1 - 0.05).astype(np.float32), np.round((RAMP * 1.1 - 0.05).clip(0, 1) * 255), "F"),
        ((RAMP * 275 - 10).astype(np.float32), np.round((RAMP * 275 - 10).clip(0, 255)), "F"),
        ((RAMP * 67000 - 900).astype(np.float32), np.round((RAMP * 67000 - 900).clip(0, 65535)) // 256, "F"),
        (np.round(RAMP * 65535).astype(np.uint16), np.round(RAMP * 65535) // 256, "I;16"),
    ],
)
def test_each_range_becomes_8_bits(pixels, want, mode):
    found, opened = decoded(pixels)
    assert opened == mode and np.abs(found - want).max() <= 1
    assert (found.min(), found.max()) == (0, 255) and (np.diff(found.ravel()) >= 0).all()


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_formats_that_have_16_bits_at_most(kind):
    """A dark image of 16 bits stays dark in whichever mode Pillow opens it; by its values it could be one of 8 bits."""
    for top in (65535, 200):
        pixels = np.round(RAMP * top).astype(np.uint16)
        assert np.array_equal(decoded(pixels, kind)[0], pixels >> 8)


def unsigned_tiff(pixels):
    """A TIFF of unsigned numbers of 32 bits, which Pillow reads as signed ones."""
    file = io.BytesIO()
    PIL.fromarray(pixels.view(np.int32)).save(file, "TIFF")
    tag, one_short = struct.pack("<H", 339), struct.pack("<HI", 3, 1)  # SampleFormat
    signed, unsigned = (tag + one_short + struct.pack("<H", kind) for kind in (2, 1))
    assert file.getvalue().count(signed) == 1
    return {"bytes": file.getvalue().replace(signed, unsigned), "path": None}


def test_unsigned_numbers_of_32_bits():
    pixels = np.round(RAMP * (2**32 - 1)).astype(np.uint32)
    assert np.array_equal(np.asarray(rgb(unsigned_tiff(pixels)))[..., 0], pixels >> 24)


@given(st.integers(256, 65535), st.integers(0, 65535))
def test_images_of_one_kind_are_scaled_alike(bright, dark):
    """By the range, not by the image's own darkest and brightest pixel."""
    pixels = np.full((4, 4), min(dark, bright), np.int32)
    pixels[0, 0] = bright
    found, _ = decoded(pixels)
    assert found[0, 0] == bright >> 8 and found[3, 3] == min(dark, bright) >> 8


@pytest.mark.parametrize(
    "pixels, message",
    [
        (np.round(RAMP * 100_000).astype(np.int32), "0 to 100000.*not known which value is black"),
        ((RAMP * 5 - 2).astype(np.float32), r"-2 to 3.*with 0 as black and 1 as white"),
        ((RAMP * 1.2).astype(np.float32), "0 to 1.2"),
        ((RAMP * 400 - 100).astype(np.float32), "-100 to 300"),
        (np.round(RAMP * 300 - 5).astype(np.int32), "-5 to 295"),
        ((RAMP * 1e12).astype(np.float32), r"0 to 1e\+12"),
        (np.where(RAMP > 0.9, np.nan, RAMP).astype(np.float32), "26 of its 256 pixels are no finite numbers"),
        (np.where(RAMP > 0.9, np.inf, RAMP).astype(np.float32), "no finite numbers"),
    ],
)
def test_what_fits_no_range_is_a_bad_image(pixels, message):
    with pytest.raises(BadImage, match=message):
        decoded(pixels)
