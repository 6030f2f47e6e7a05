"""Images much longer than wide take no gigabytes, and are seen as timm sees them."""

import numpy as np
import pytest
import torch
from PIL import Image as PIL
from timm.data import create_transform

from apart_hf.data import data_config
from apart_hf.data.transforms import LONGEST, eval_transform, train_transform

PHOTO = data_config({"input_size": (3, 224, 224), "crop_pct": 0.875, "interpolation": "bicubic"}, (500, 400))
SMALL = data_config({"input_size": (3, 224, 224)}, (32, 32))


def timms(config):
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_transform(**{key: config[key] for key in keys})


@pytest.fixture
def largest(monkeypatch):
    """The most pixels that any image is resized to."""
    seen, resize = [0], PIL.Image.resize

    def measured(image, size, *args, **kwargs):
        seen[0] = max(seen[0], size[0] * size[1])
        assert seen[0] < 10**8, "gigabytes"
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(PIL.Image, "resize", measured)
    return seen


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (30_000, 40), (2, 9_000)])
@pytest.mark.parametrize("config, image_size", [(PHOTO, (500, 400)), (SMALL, (32, 32))])
def test_no_resized_image_is_large(size, config, image_size, largest):
    image = PIL.new("RGB", size, (9, 9, 9))
    edge = config["input_size"][-1]
    for transform in (eval_transform(config), train_transform(config, image_size)):
        assert transform(image).shape == (3, edge, edge)
    assert 0 < largest[0] <= LONGEST * 256 * 256


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_modes_that_show_the_whole_image_do(mode, largest):
    config = PHOTO | {"crop_mode": mode}
    for size in [(600, 3), (3, 600), (50, 20)]:
        assert torch.equal(eval_transform(config)(smooth(*size)), timms(config)(smooth(*size)))
    for size in [(3000, 3), (1, 20_000)]:  # of which timm's border leaves no width
        assert eval_transform(config)(smooth(*size)).shape == (3, 224, 224)
    assert largest[0] < 10**6


def smooth(width, height):
    """A picture with as much to see at each place."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([127 + 100 * np.sin(x / 7), 127 + 100 * np.cos(y / 5), (x + y) % 256], -1)
    return PIL.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("size", [(32 * 20, 20), (20, 32 * 20), (500, 375)])
def test_others_are_timm_s_bit_for_bit(size):
    assert torch.equal(eval_transform(PHOTO)(smooth(*size)), timms(PHOTO)(smooth(*size)))


@pytest.mark.parametrize("size", [(40 * 20, 20), (21, 1001)])
def test_what_is_cut_off_is_what_timm_does_not_show(size):
    """Resampled at a distance of a fraction of a pixel, so not bit for bit; one grey level is 0.017."""
    ours, theirs = eval_transform(PHOTO)(smooth(*size)), timms(PHOTO)(smooth(*size))
    assert (ours - theirs).abs().mean() < 0.02 < 0.3 < (ours - theirs.flip(-1)).abs().mean()


def test_small_images_are_cropped_anywhere_along_their_length():
    image = PIL.fromarray(np.repeat(np.linspace(0, 255, 4096).astype(np.uint8)[None, :, None], 32, 0).repeat(3, -1))
    torch.manual_seed(0)
    transform = train_transform(SMALL | {"mean": (0.0,) * 3, "std": (1.0,) * 3}, (32, 32), padding=0)
    centres = np.array([transform(image).mean() for _ in range(60)])
    assert centres.min() < 0.1 and centres.max() > 0.9
