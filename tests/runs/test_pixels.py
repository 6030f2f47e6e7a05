"""Runs on photos and microscope images as they come: what they show is learnt, and measured again the same."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags
from PIL import Image as PIL

from apart_hf.cli.validate import main as validate_command
from apart_hf.runs.train import train
from tests.support.settings import settings

EDGE = 16
# what turns an upright image into one that lies as the orientation says: the reverse of how it is turned upright
LYING = {1: None, 3: PIL.Transpose.ROTATE_180, 6: PIL.Transpose.ROTATE_90, 8: PIL.Transpose.ROTATE_270}


def halves(bright_above, rng):
    """Fractions, bright above or below."""
    pixels = rng.uniform(0, 0.2, (EDGE, EDGE))
    pixels[slice(0, EDGE // 2) if bright_above else slice(EDGE // 2, EDGE)] += 0.7
    return pixels


def write(folder, save):
    """Two classes; save(pixels, path without its ending, number)."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 48), ("val", 12)):
        for name in ("above", "below"):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                save(halves(name == "above", rng), folder / part / name / f"{number}", number)
    return str(folder)


def learnt(data, output, **more):
    """Top-1 of a short run, and its folder."""
    more = {"epochs": 3, "lr": 0.05, "checkpoint_every": None, "padding": 0} | more
    folder = train(settings(data, output, **more))
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["top1"], folder


SCALES = {  # of which black and white are, and in which arithmetic
    "floats to 1": (1, np.float32),
    "floats to 65,535": (65_535, np.float32),
    "integers to 65,535": (65_535, np.int32),
    "integers of 31 bits": (2**31 - 1, np.int32),
    "integers of 16 bits": (65_535, np.uint16),
}


@pytest.mark.parametrize("scale", SCALES)
def test_images_of_32_bits_are_learnt(scale, tmp_path):
    """Cut off at 255 all of them are black or white, and training is at chance."""
    white, kind = SCALES[scale]

    def save(pixels, path, number):
        # above all of them 255, where there is more
        shifted = pixels if white == 1 else 0.1 + 0.9 * pixels
        PIL.fromarray((shifted * white).astype(kind)).save(f"{path}.tif")

    assert learnt(write(tmp_path / "data", save), tmp_path / "out", in_chans=1)[0] == 100


def save_turned(pixels, path, number):
    """As a camera does that is held in some way."""
    orientation = list(LYING)[number % len(LYING)]
    image = PIL.fromarray((pixels * 255).astype(np.uint8)).convert("RGB")
    if LYING[orientation] is not None:
        image = image.transpose(LYING[orientation])
    block = PIL.Exif()
    block[ExifTags.Base.Orientation] = orientation
    image.save(f"{path}.jpg", quality=95, exif=block.tobytes())


@pytest.mark.parametrize("more", [{}, {"loader": "workers"}, {"streaming": True}])
def test_photos_are_turned_in_training_evaluation_and_validation(more, tmp_path, capsys):
    data = write(tmp_path / "data", save_turned)
    top1, folder = learnt(data, tmp_path / "out", **more)
    assert top1 == 100
    capsys.readouterr()
    validate_command(
        ["--checkpoint", str(folder), "--data-dir", data, *(["--streaming"] if "streaming" in more else [])]
    )
    found = capsys.readouterr().out
    assert "top-1 100.00 %" in found


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_photos_with_damaged_exif_are_learnt(tmp_path):
    def save(pixels, path, number):
        save_turned(pixels, path, 0)
        photo = Path(f"{path}.jpg")
        content = bytearray(photo.read_bytes())
        entries = content.index(b"Exif\0\0") + 14
        content[entries : entries + 2] = b"\xff\xff"  # more than there can be
        photo.write_bytes(content)

    assert learnt(write(tmp_path / "data", save), tmp_path / "out")[0] == 100
