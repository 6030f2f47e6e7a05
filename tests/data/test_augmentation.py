"""timm's settings of training images, by the numbers of pixels: erasing, crops, flips, repeats, and nothing at all."""

import dataclasses

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import create_transform

from apart_hf import ApartError
from apart_hf.config.defaults import fill_defaults
from apart_hf.config.train_config import TrainConfig
from apart_hf.data import Loaders, LoaderSettings
from apart_hf.data.dataset_base import seeded
from apart_hf.data.repeated import RepeatedImages
from apart_hf.data.transforms import eval_transform, train_transform
from apart_hf.runs.components import loader_settings
from tests.support.helpers import load
from tests.support.settings import CONFIG, CONFIG_16

LARGE = CONFIG | {"input_size": (3, 64, 64), "mean": (0.0,) * 3, "std": (1.0,) * 3}


def picture(width=16, height=16):
    """Every pixel differs from every other: red tells the column, green the line."""
    lines, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([columns, lines, 0 * lines], -1).astype(np.uint8))


def drawn(transform, image, count=400):
    found = []
    for number in range(count):
        with seeded(number):
            found.append(transform(image))
    return torch.stack(found)


def erased(remode, recount=1, reprob=1.0):
    """What is put where it erases, of a picture of one colour that is far from noise."""
    transform = train_transform(CONFIG_16, (16, 16), 0, reprob=reprob, remode=remode, recount=recount, hflip=0.0)
    plain = train_transform(CONFIG_16, (16, 16), 0, hflip=0.0)(Image.new("RGB", (16, 16), (255, 255, 255)))
    images = drawn(transform, Image.new("RGB", (16, 16), (255, 255, 255)))
    return images, (images != plain).any(1)


@pytest.mark.parametrize("remode", ["const", "rand", "pixel"])
def test_what_erasing_puts_there(remode):
    images, where = erased(remode)
    assert where.any((1, 2)).all() and 0.02 < where.float().mean() < 0.33  # shares of an image, as in timm
    boxes = [image[:, place] for image, place in zip(images, where)]
    if remode == "const":
        assert all((box == 0).all() for box in boxes)  # the mean, after normalisation
    elif remode == "rand":
        assert all((box == box[:, :1]).all() for box in boxes)
        assert len({tuple(box[:, 0].tolist()) for box in boxes}) > 300
    else:
        values = torch.cat([box.flatten() for box in boxes])
        assert values.mean().abs() < 0.02 and values.std().item() == pytest.approx(1, abs=0.02)


def test_how_often_and_how_many_it_erases():
    _, where = erased("const", reprob=0.3)
    assert where.any((1, 2)).float().mean().item() == pytest.approx(0.3, abs=0.06)
    colours = []
    for recount in (1, 3):
        images, where = erased("rand", recount)
        found = [len({tuple(c) for c in image[:, place].T.tolist()}) for image, place in zip(images, where)]
        colours.append(found)
    assert set(colours[0]) == {1} and set(colours[1]) == {1, 2, 3}


@pytest.mark.parametrize("scale", [(0.2, 0.3), (0.9, 1.0)])
@pytest.mark.parametrize("edge", [64, 200])
def test_the_share_that_a_crop_takes(scale, edge):
    """Of small images too, where it is asked for."""
    image = picture(edge, edge)
    transform = train_transform(LARGE, (edge, edge), scale=scale, hflip=0.0, interpolation="nearest")
    crops = 255 * drawn(transform, image, 200)
    widths, heights = (crops[:, channel].flatten(1) for channel in (0, 1))
    shares = [(v.max(1).values - v.min(1).values + 1) / edge for v in (widths, heights)]
    areas = shares[0] * shares[1]
    assert scale[0] * 0.85 <= areas.min() and areas.max() <= min(1.0, scale[1] * 1.15)
    theirs = create_transform(
        (3, 64, 64),
        is_training=True,
        scale=scale,
        hflip=0.0,
        interpolation="nearest",
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        color_jitter=0.0,
        separate=False,
    )
    assert torch.equal(drawn(theirs, image, 20), drawn(transform, image, 20))


@pytest.mark.parametrize("hflip, vflip", [(0.0, 0.0), (0.5, 0.0), (0.2, 0.7), (1.0, 1.0)])
@pytest.mark.parametrize("edge", [16, 200])
def test_flips(hflip, vflip, edge):
    scale = None if edge == 16 else (1.0, 1.0)
    config = CONFIG_16 | {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    transform = train_transform(config, (edge, edge), 0, scale=scale, hflip=hflip, vflip=vflip)
    images = drawn(transform, picture(edge, edge))
    across = images[:, 0, 0, 0] > images[:, 0, 0, -1]
    down = images[:, 1, 0, 0] > images[:, 1, -1, 0]
    assert [across.float().mean().item(), down.float().mean().item()] == pytest.approx([hflip, vflip], abs=0.07)


@pytest.mark.parametrize("hflip, vflip", [(0.0, 0.0), (0.5, 0.0), (0.2, 0.7), (1.0, 1.0)])
def test_flips_of_batches_from_memory(hflip, vflip):
    data = load()
    train, _ = loaders(data, "memory", augmentation={"hflip": hflip, "vflip": vflip}, padding=0)
    plain, _ = loaders(data, "memory", augmentation={"no_aug": True})
    counts = torch.zeros(4)
    for rows in np.arange(2000).reshape(-1, 40):
        images, whole = (one.dataset.__getitems__(rows.tolist())[0] for one in (train, plain))
        kinds = [whole, whole.flip(3), whole.flip(2), whole.flip(2, 3)]
        same = torch.stack([(images == kind).flatten(1).all(1) for kind in kinds])
        assert same.any(0).all()
        counts += same.float().sum(1)  # few images are symmetric
    want = [(1 - hflip) * (1 - vflip), hflip * (1 - vflip), (1 - hflip) * vflip, hflip * vflip]
    assert (counts / 2000).tolist() == pytest.approx(want, abs=0.04)


def loaders(data, loader="auto", accelerator=None, **more):
    settings = LoaderSettings(CONFIG, 40, 40, loader, **more)
    made = Loaders(data, settings, accelerator or Accelerator(cpu=True))
    return made.train(), made


@pytest.mark.parametrize("edge", [28, 40])
def test_without_augmentation_images_are_as_they_are(edge):
    config = CONFIG | {"input_size": (3, edge, edge)}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    shown = drawn(train_transform(config, (28, 28), 4, no_aug=True, reprob=1.0, aa="v0", hflip=1.0), image, 5)
    assert (shown == shown[0]).all() and torch.equal(shown[0], eval_transform(config)(image))


def test_both_loaders_show_the_same_without_augmentation():
    data = load()
    memory, kind = loaders(data, augmentation={"no_aug": True})
    workers, _ = loaders(data, "workers", augmentation={"no_aug": True})
    assert kind.kind == "memory"
    rows = list(range(64))
    images, labels = memory.dataset.__getitems__(rows)
    one_by_one = workers.dataset.__getitems__(rows)
    assert torch.allclose(images, torch.stack([image for image, _ in one_by_one]), atol=1e-6)
    assert labels.tolist() == [label for _, label in one_by_one]


@pytest.mark.parametrize(
    "given, flag",
    [
        ({"reprob": 0.1}, "--reprob"),
        ({"aa": "v0"}, "--aa"),
        ({"scale": [0.5, 1.0]}, "--scale"),
        ({"color_jitter": 0.4}, "--color-jitter"),
    ],
)
def test_what_needs_single_images_is_refused_by_the_memory_loader(given, flag):
    config = fill_defaults(TrainConfig(**given))
    data, accelerator = load(), Accelerator(cpu=True)
    assert Loaders(data, loader_settings(config, CONFIG), accelerator).kind == "workers"
    asked = fill_defaults(TrainConfig(loader="memory", **given))
    with pytest.raises(ApartError, match=f"--loader memory: {flag} works on single images; use --loader workers"):
        Loaders(data, loader_settings(asked, CONFIG), accelerator)
    assert (
        Loaders(data, loader_settings(fill_defaults(TrainConfig(no_aug=True, **given)), CONFIG), accelerator).kind
        == "memory"
    )


@pytest.mark.parametrize(
    "given, name",
    [
        ({}, None),
        ({"interpolation": "random"}, "random"),
        ({"train_interpolation": "bilinear"}, "bilinear"),
        ({"interpolation": "random", "train_interpolation": "nearest"}, "nearest"),
        ({"interpolation": "bilinear"}, None),
        ({"interpolation": "random", "no_aug": True}, None),
    ],
)
def test_how_training_images_are_resized(given, name):
    settings = loader_settings(fill_defaults(TrainConfig(**given)), CONFIG)
    assert settings.augmentation["interpolation"] == name
    if name == "nearest":
        config = CONFIG | {"input_size": (3, 56, 56), "mean": (0.0,) * 3, "std": (1.0,) * 3}
        image = drawn(train_transform(config, (28, 28), 0, hflip=0.0, interpolation=name), picture(28, 28), 1)[0]
        assert torch.equal(image[0, 0] * 255, torch.arange(28.0).repeat_interleave(2))


class Sized:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("repeats", [2, 3, 1.5])
def test_repeats_go_round_the_processes(processes, repeats):
    """As in timm's sampler: each image comes so often, on as many processes as there are; the epoch stays as long."""
    samplers = [RepeatedImages(Sized(1024), repeats, seed=5, process=p, processes=processes) for p in range(processes)]
    for epoch in (0, 1):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert all(len(share) == len(samplers[0]) == 1024 // processes for share in shares)
        order = [index for group in zip(*shares) for index in group]  # as one process would see them
        counts = np.bincount(order, minlength=1024)
        assert set(counts[counts > 0]) <= ({int(repeats), int(repeats) + 1, 1}) and counts.sum() == 1024
        shown = counts[counts > 0]
        assert shown.mean() == pytest.approx(repeats, rel=0.01)
        if repeats == processes:
            assert all(len(set(share)) == len(share) for share in shares)  # each process sees an image once


def test_the_order_of_repeats_depends_on_seed_and_epoch():
    def order(seed, epoch):
        sampler = RepeatedImages(Sized(512), 2, seed=seed, process=0, processes=1)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 3) == order(1, 3) and order(1, 3) != order(1, 4) and order(1, 3) != order(2, 3)


class Rank:
    """What of an accelerator a loader looks at, of one process among several."""

    def __init__(self, process, processes):
        self.process_index, self.num_processes, self.device = process, processes, torch.device("cpu")
        self.is_main_process = process == 0


@pytest.mark.parametrize("loader, augmentation", [("memory", {}), ("workers", {"scale": [0.3, 1.0]})])
def test_repeated_images_differ_within_a_batch_and_between_processes(loader, augmentation):
    data = load()
    batches = []
    for process in range(2):
        train, _ = loaders(data, loader, Rank(process, 2), augmentation=augmentation, repeats=2, padding=4)
        train.set_epoch(1)
        batches.append(next(iter(train)))
    (first, labels), (second, others) = batches
    assert torch.equal(labels, others)  # the same images
    same = (first == second).flatten(1).all(1)
    assert same.sum() <= 3  # in augmentations of their own
    train, _ = loaders(data, loader, augmentation=augmentation, repeats=4, padding=4)
    assert len(train) == len(data.train) // 256 * 256 // 40
    images, labels = next(iter(train))
    fours = images.view(10, 4, *images.shape[1:])
    assert (labels.view(10, 4) == labels.view(10, 4)[:, :1]).all()
    assert not (fours[:, 1:] == fours[:, :1]).flatten(2).all(2).all(1).any()


def test_too_few_repeated_images():
    """timm's sampler shows whole groups of 256, here one, to two processes."""
    data = load()
    data = dataclasses.replace(data, train=data.train.part(np.arange(300)))
    made = Loaders(data, LoaderSettings(CONFIG, 140, 140, repeats=2), Rank(0, 2))
    with pytest.raises(
        ApartError, match=r"--aug-repeats 2: 128 images are shown to each of 2 process.* 140; use a smaller"
    ):
        made.train()
