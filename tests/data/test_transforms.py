"""Images become the tensors that training and evaluation see."""

import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image as PILImage

from apart_hf.data import data_config
from apart_hf.data.dataset_map import TransformedImages
from apart_hf.data.decoding import rgb
from apart_hf.data.transforms import _posterize, eval_transform, train_transform
from tests.support.helpers import load
from tests.support.images import images


def test_grey_images_become_rgb_tensors():
    data = load("demo")
    config = data_config(timm.get_pretrained_cfg("resnet18").to_dict(), data.image_size, mean=(0.286,) * 3)
    image, label = TransformedImages(data.val, eval_transform(config))[0]
    assert image.shape == (3, 28, 28) and isinstance(label, int)
    ((cell, _),) = data.val.cells([0])
    assert PILImage.open(io.BytesIO(cell["bytes"])).mode == "L"


def test_the_evaluation_transform_leaves_small_images_alone():
    data = load("demo")
    config = data_config({"input_size": (3, 224, 224)}, data.image_size, mean=(0.25,) * 3, std=(0.5,) * 3)
    image = rgb(data.val.cells([0])[0][0])
    tensor = eval_transform(config)(image)
    pixels = torch.from_numpy(np.array(image)[..., 0])
    assert torch.allclose(tensor[0], (pixels / 255 - 0.25) / 0.5)


def test_the_training_transform_is_pad_4_crop_flip():
    """Every drawn image is one of the 9 x 9 crops of the padded original, flipped or not; all of them occur."""
    config = data_config({"input_size": (3, 224, 224)}, (8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    original = images(1, (8, 8))[0]
    padded = torch.nn.functional.pad(torch.from_numpy(np.array(original)).permute(2, 0, 1) / 255, (4, 4, 4, 4))
    crops = {}
    for y in range(9):
        for x in range(9):
            crop = padded[:, y : y + 8, x : x + 8]
            crops[crop.numpy().tobytes()], crops[crop.flip(-1).numpy().tobytes()] = (y, x, False), (y, x, True)
    torch.manual_seed(0)
    transform = train_transform(config, (8, 8))
    drawn = [crops[transform(original).numpy().tobytes()] for _ in range(600)]
    assert len({(y, x) for y, x, _ in drawn}) > 78
    assert 250 < sum(flipped for *_, flipped in drawn) < 350  # four standard deviations


def test_large_images_take_timms_transform():
    config = data_config(timm.get_pretrained_cfg("resnet18").to_dict(), (500, 400))
    assert config["input_size"] == (3, 224, 224) and config["crop_pct"] < 1
    assert "RandomResizedCrop" in str(train_transform(config, (500, 400)))
    assert train_transform(config, (500, 400))(images(1, (500, 400))[0]).shape == (3, 224, 224)


@pytest.mark.parametrize("size", [(28, 40), (40, 28)])
def test_small_images_that_are_not_square(size):
    config = data_config(timm.get_pretrained_cfg("resnet18").to_dict(), size)
    for transform in (train_transform(config, size), eval_transform(config)):
        assert transform(images(1, size)[0]).shape == (3, 28, 28)


def test_images_of_mixed_sizes():
    config = data_config(timm.get_pretrained_cfg("resnet18").to_dict(), (32, 32))
    for transform in (train_transform(config, (32, 32)), eval_transform(config)):
        for size in ((32, 32), (20, 24), (300, 200)):
            assert transform(images(1, size)[0]).shape == (3, 32, 32)


def test_img_size_resizes():
    config = data_config(timm.get_pretrained_cfg("resnet18").to_dict(), (28, 28), img_size=40)
    for transform in (train_transform(config, (28, 28)), eval_transform(config)):
        assert transform(images(1, (28, 28))[0]).shape == (3, 40, 40)


def test_small_images_are_resized_alike_in_training_and_evaluation():
    config = data_config(timm.get_pretrained_cfg("resnet18").to_dict(), (28, 28), img_size=40, interpolation="nearest")
    original = images(1, (28, 28))[0]
    torch.manual_seed(0)
    want = eval_transform(config)(original)
    drawn = [train_transform(config, (28, 28), padding=0)(original) for _ in range(8)]
    assert all(any(torch.equal(one, other) for other in (want, want.flip(-1))) for one in drawn)


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "rand-m9-n8", "augmix-m9-w3", "v0", "original", "3a"])
def test_policies_run_in_any_version_of_pillow(aa):
    """Pillow 13 refuses to keep 0 bits of an image, which timm's policies ask for now and then."""
    config = data_config(timm.get_pretrained_cfg("resnet18").to_dict(), (28, 28))
    transform = train_transform(config, (28, 28), aa=aa)
    torch.manual_seed(0)
    for image in images(300, (28, 28)):
        assert transform(image).shape == (3, 28, 28)


@pytest.mark.parametrize("bits, kept", [(0, 0), (1, 128), (3, 224), (8, 255)])
def test_posterized_bits(bits, kept):
    image = images(1, (28, 28))[0]
    assert np.array_equal(np.asarray(_posterize(image, bits)), np.asarray(image) & kept)


def test_grey_of_16_bits():
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    file = io.BytesIO()
    PILImage.fromarray(ramp).save(file, "PNG")
    assert (np.asarray(rgb({"bytes": file.getvalue(), "path": None})) == (ramp >> 8)[..., None]).all()
