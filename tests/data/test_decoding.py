"""From a file to upright RGB pixels: EXIF whole and damaged, sizes from headers, bombs, and damage of any kind."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, ImageOps, JpegImagePlugin
from PIL import Image as PIL
from PIL.TiffImagePlugin import IFDRational

from apart_hf.data.decoding import BadImage, rgb, upright_size
from tests.support.images import images

EXIF_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "MPO")
FORMATS = (*EXIF_FORMATS, "GIF", "BMP", "PPM", "TGA", "JPEG2000")
ORIENTATIONS = range(1, 9)


def cell(content):
    return {"bytes": content, "path": None}


def exif(orientation):
    block = PIL.Exif()
    block[ExifTags.Base.Orientation], block[ExifTags.Base.Make] = orientation, "Camera"
    for tag in (ExifTags.Base.XResolution, ExifTags.Base.YResolution):
        block[tag] = IFDRational(72, 1)
    block[ExifTags.Base.ResolutionUnit] = 2
    return block.tobytes()


def encoded(kind, orientation=None, size=(40, 30), image=None):
    file = io.BytesIO()
    more = {} if orientation is None else {"exif": exif(orientation)}
    (image or images(1, size)[0]).save(file, kind, **more)
    return file.getvalue()


@pytest.mark.parametrize("kind", EXIF_FORMATS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_images_are_turned_upright(kind, orientation):
    content = encoded(kind, orientation)
    want = ImageOps.exif_transpose(PIL.open(io.BytesIO(content))).convert("RGB")
    found = rgb(cell(content))
    assert found.size == ((30, 40) if orientation > 4 else (40, 30)) == upright_size(cell(content))
    assert np.array_equal(np.asarray(found), np.asarray(want))


def test_an_orientation_in_xmp():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    file = io.BytesIO()
    images(1, (40, 30))[0].save(file, "JPEG", xmp=xmp)
    assert rgb(cell(file.getvalue())).size == upright_size(cell(file.getvalue())) == (30, 40)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_header_tells_the_size(kind, mode, tmp_path):
    content = encoded(kind, image=images(1, (50, 20), mode)[0])
    (tmp_path / "image").write_bytes(content)
    for one in (cell(content), {"bytes": None, "path": str(tmp_path / "image")}):
        assert upright_size(one) == rgb(one).size == (50, 20)


def test_the_size_is_read_without_pixels(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)  # would fail
    assert [upright_size(cell(encoded(kind, 6))) for kind in ("PNG", "JPEG")] == [(30, 40)] * 2
    assert upright_size(cell(encoded("PNG", size=(3000, 2000)))) == (3000, 2000)


def damaged_blocks(kind):
    """A file with a wrong byte anywhere in its EXIF block, which PNG has under a checksum."""
    whole = encoded(kind, 6)
    start, length = whole.index(exif(6)[6:]), len(exif(6)) - 6
    for position in range(start, start + length):
        for value in (0, 1, 0x7F, 0xFF):
            content = bytearray(whole)
            content[position] = value
            if kind == "PNG":
                chunk = content[start - 4 : start + length]
                content[start + length : start + length + 4] = struct.pack(">I", zlib.crc32(bytes(chunk)))
            yield bytes(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_exif_block_makes_no_bad_image(kind):
    lying = np.asarray(PIL.open(io.BytesIO(encoded(kind, 6))).convert("RGB"))
    turned = {np.asarray(PIL.fromarray(lying).transpose(turn)).tobytes() for turn in PIL.Transpose}
    turned.add(lying.tobytes())
    contents = list(damaged_blocks(kind))
    assert len(contents) > 300
    upright = 0
    for content in contents:
        found = rgb(cell(content))
        assert found.tobytes() in turned and upright_size(cell(content)) == found.size
        upright += found.size == (30, 40)
    assert upright > len(contents) / 2  # most bytes are of other tags


@pytest.mark.parametrize("error", [ZeroDivisionError, SyntaxError, struct.error, KeyError, TypeError])
@pytest.mark.parametrize("where", ["getexif", "opening"])
def test_whatever_exif_raises_the_pixels_are_good(where, error, monkeypatch):
    """Versions of Pillow differ in what a damaged block raises, and whether already where the file is opened."""
    content = encoded("JPEG", 6)
    lying = np.asarray(PIL.open(io.BytesIO(content)))

    def fails(image):
        if "exif" in image.info:
            raise error("division by zero")
        return PIL.Exif()

    if where == "getexif":
        monkeypatch.setattr(PIL.Image, "getexif", fails)
    else:
        monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "_read_dpi_from_exif", fails)
    assert np.array_equal(np.asarray(rgb(cell(content))), lying) and upright_size(cell(content)) == (40, 30)


def png_header(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + parts + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def test_a_decompression_bomb_is_a_bad_image(tmp_path):
    for look in (rgb, upright_size):
        with pytest.raises(BadImage, match=r"900000000 pixels.*decompression bomb"):
            look(cell(png_header(30_000, 30_000)))


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_warning_that_the_user_made_an_error_is_a_bad_image():
    with pytest.raises(BadImage, match="decompression bomb"):
        rgb(cell(png_header(10_000, 10_000)))


@pytest.mark.parametrize("path", ["gone.png", "folder", "folder/image.png/part"])
def test_a_path_that_is_no_file(path, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/image.png").write_bytes(encoded("PNG"))
    for look in (rgb, upright_size):
        with pytest.raises(BadImage):
            look({"bytes": None, "path": str(tmp_path / path)})


WHOLE = {kind: encoded(kind, 6 if kind in EXIF_FORMATS else None) for kind in FORMATS}


@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=20),
    st.floats(0, 1) | st.just(1.0),
)
@settings(max_examples=300, deadline=None, derandomize=True)
@pytest.mark.filterwarnings("ignore")
def test_any_damage_is_a_bad_image_or_none(kind, changes, length):
    content = bytearray(WHOLE[kind])
    for place, value in changes:
        content[int(place**3 * (len(content) - 1))] = value  # more often in the header
    for look in (rgb, upright_size):
        try:
            look(cell(bytes(content[: int(length * len(content))])))
        except BadImage as error:
            assert str(error)
