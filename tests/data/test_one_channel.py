"""Grey images in one channel: the same numbers by every loader, and by timm."""

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image as PIL

from apart_hf import ApartError
from apart_hf.data import Loaders, LoaderSettings, data_config
from apart_hf.data.dataset_memory import LARGEST, fits_in_memory
from apart_hf.data.decoding import rgb
from apart_hf.data.transforms import eval_transform, train_transform
from tests.support.helpers import load
from tests.support.images import images, labelled
from tests.support.settings import CONFIG

GREY = CONFIG | {"input_size": (1, 28, 28), "mean": (0.25,), "std": (0.5,)}
LOADERS = {"memory": {}, "workers": {"loader": "workers"}, "stream": {"workers": 1}}


def batches(loader, config=GREY, training=False, **more):
    data = load(streaming=loader == "stream")
    settings = LoaderSettings(config, 40, 40, **LOADERS[loader] | more)
    made = Loaders(data, settings, Accelerator(cpu=True))
    assert loader == "stream" or made.kind == loader
    return made.train() if training else made.evaluation(data.val)


def test_every_loader_gives_the_same():
    data = load()
    pixels = np.stack([np.asarray(rgb(cell).convert("L")) for cell, _ in data.val.cells(range(len(data.val)))])
    want = (torch.from_numpy(pixels).float().div(255)[:, None] - 0.25) / 0.5
    for loader in LOADERS:
        found = torch.cat([images for images, _ in batches(loader)])
        assert found.shape == (1000, 1, 28, 28) and torch.allclose(found, want, atol=1e-6)
    memory, workers = (list(batches(loader)) for loader in ("memory", "workers"))
    for (a, x), (b, y) in zip(memory, workers, strict=True):
        assert torch.equal(a, b) and torch.equal(x, y)


@pytest.mark.parametrize("loader", LOADERS)
def test_training_batches_have_one_channel(loader):
    """The demo set has no border of its own, so each is an image or its mirror."""
    found, labels = next(iter(batches(loader, training=True)))
    assert found.shape == (40, 1, 28, 28) and len(labels) == 40
    data = load()
    known = {eval_transform(GREY)(rgb(cell)).numpy().tobytes() for cell, _ in data.train.cells(range(len(data.train)))}
    for image in found:
        ways = {image.contiguous().numpy().tobytes(), image.flip(-1).contiguous().numpy().tobytes()}
        assert ways & known


def test_one_byte_a_pixel_is_kept():
    count = LARGEST // 28**2
    assert fits_in_memory(count, 28, 0, channels=1) and not fits_in_memory(count // 4 + 1, 28, 0)
    assert batches("memory", training=True).dataset.pixels.dtype == torch.uint8


def test_colours_become_grey_as_in_timm():
    image = images(1, (28, 28))[0]
    theirs = timm.data.create_transform(**{key: GREY[key] for key in ("input_size", "mean", "std", "crop_pct")})
    assert torch.equal(eval_transform(GREY)(image), theirs(image.convert("L")))


@pytest.mark.parametrize(
    "aa", [None, "rand-m9-mstd0.5", "rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", "v0", "3a"]
)
@pytest.mark.parametrize("size, edge", [((28, 28), 28), ((300, 200), 64)])
def test_augmentation_takes_grey_images(aa, size, edge):
    config = GREY | {"input_size": (1, edge, edge)}
    transform = train_transform(config, size, aa=aa, color_jitter=0.0 if aa else 0.4, reprob=0.5)
    torch.manual_seed(0)
    for image in [*images(20, size), *images(20, size, "L")]:
        assert transform(image.convert("RGB")).shape == (1, edge, edge)


@pytest.mark.parametrize(
    "channels, mean, want",
    [
        (1, None, (0.485 + 0.456 + 0.406) / 3),
        (1, (0.3, 0.4, 0.8), 0.5),
        (1, [0.13], 0.13),
        (3, [0.13], (0.13,) * 3),
        (3, (0.3, 0.4, 0.8), (0.3, 0.4, 0.8)),
    ],
)
def test_mean_and_deviation_of_each_channel(channels, mean, want):
    source = timm.get_pretrained_cfg("resnet18").to_dict()
    found = data_config(source, (28, 28), mean=mean, std=mean, channels=channels)
    assert found["input_size"] == (channels, 28, 28) and len(found["mean"]) == len(found["std"]) == channels
    assert found["mean"] == pytest.approx(want if channels == 3 else (want,))
    if mean is not None:
        assert found["std"] == found["mean"]


def test_other_channels_are_refused():
    with pytest.raises(ApartError, match="the network takes images of 4 channels, and they are read with 1 or 3 only"):
        batches("workers", CONFIG | {"input_size": (4, 28, 28)})


def test_grey_of_16_bits_is_not_cut(tmp_path):
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(2):
                PIL.fromarray(ramp).save(tmp_path / part / name / f"{number}.png")
    config = GREY | {"input_size": (1, 16, 16), "mean": (0.0,), "std": (1.0,)}
    data = load(data_dir=str(tmp_path))
    found, _ = next(iter(Loaders(data, LoaderSettings(config, 4, 4), Accelerator(cpu=True)).evaluation(data.val)))
    assert torch.equal(found[0, 0], torch.from_numpy((ramp >> 8).astype(np.float32)) / 255)


def test_images_of_a_table_that_have_colours(parquet):
    rows = labelled(16)
    config = GREY | {"input_size": (1, 16, 16)}
    data = load(data_dir=parquet(train=rows, test=rows))
    found, _ = next(iter(Loaders(data, LoaderSettings(config, 4, 4), Accelerator(cpu=True)).evaluation(data.val)))
    want = [eval_transform(config)(image) for image in rows["image"][:4]]
    assert torch.equal(found, torch.stack(want))
