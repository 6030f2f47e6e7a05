"""Batches from memory are those of the per-image transforms: the same images, drawn with the same probabilities."""

import io
import itertools
import json
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PIL
from torchvision import transforms as T

from apart_hf import ApartError
from apart_hf.config.train_config import TrainConfig
from apart_hf.data import Loaders, LoaderSettings, Split
from apart_hf.data.dataset_memory import InMemoryImages, decode
from apart_hf.data.decoding import rgb
from apart_hf.runs.train import train
from tests.support.helpers import load
from tests.support.settings import CONFIG, MEAN, STD


def settings(loader="auto", **more):
    values = {
        "images": CONFIG,
        "batch_size": 40,
        "eval_batch_size": 40,
        "workers": 0,
        "seed": 0,
        "augmentation": {"aa": None, "color_jitter": 0.0, "reprob": 0.0},
    }
    return LoaderSettings(**values | {"loader": loader} | more)


def make_loaders(data, settings):
    loaders = Loaders(data, settings, Accelerator(cpu=True))
    return loaders.train(), loaders.evaluation(data.val), loaders.kind


def column(images):
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    rows = Dataset.from_dict({"image": images, "label": [i % 10 for i in range(len(images))]}, features=features)
    return Split.of(rows, "train", "image", "label")


def noise(count, edge=6):
    rng = np.random.default_rng(0)
    return [PIL.fromarray(rng.integers(0, 256, (edge, edge, 3), dtype=np.uint8)) for _ in range(count)]


def test_evaluation_batches_are_the_per_image_ones_bit_for_bit():
    data = load()
    (_, memory, kind), (_, workers, other) = (make_loaders(data, settings(loader)) for loader in ("auto", "workers"))
    assert (kind, other) == ("memory", "workers") and len(memory) == len(workers) == 25
    for (a, x), (b, y) in zip(memory, workers):
        assert torch.equal(a, b) and torch.equal(x, y) and a.dtype == b.dtype and a.stride() == b.stride()


def test_every_crop_and_flip_has_its_probability():
    """Each drawn image is one of the 2 x 25 that crop and flip can give, and all of them are equally frequent."""
    image, padding, draws = noise(1)[0], 2, 50 * 200
    dataset = InMemoryImages(decode(column([image]), 6)[0], [3], MEAN, STD, padding=padding, flip=True)
    padded = T.Pad(padding)(image)
    finish = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])
    possible = {}
    for top, left, flip in itertools.product(range(5), range(5), (False, True)):
        crop = T.functional.crop(padded, top, left, 6, 6)
        possible[finish(T.functional.hflip(crop) if flip else crop).numpy().tobytes()] = 0
    assert len(possible) == 50
    for _ in range(4):
        dataset.set_epoch(dataset.epoch + 1)
        images, labels = dataset.__getitems__([0] * (draws // 4))
        assert (labels == 3).all()
        for found in images:
            possible[found.contiguous().numpy().tobytes()] += 1  # KeyError: no crop of this image
    chi_square = sum((count - draws / 50) ** 2 / (draws / 50) for count in possible.values())
    assert chi_square < 85.4  # exceeded by chance once in 1,000 times (49 degrees of freedom)


def test_any_batch_can_be_drawn_again():
    dataset = InMemoryImages(decode(column(noise(8)), 6)[0], range(8), MEAN, STD, padding=4, flip=True, seed=3)
    first = dataset.__getitems__([5, 0, 2])
    dataset.__getitems__([1, 3])
    again = dataset.__getitems__([5, 0, 2])
    assert torch.equal(first[0], again[0]) and again[1].tolist() == [5, 0, 2]
    dataset.set_epoch(1)
    assert not torch.equal(dataset.__getitems__([5, 0, 2])[0], first[0])


def test_samples_of_a_batch_are_drawn_apart():
    dataset = InMemoryImages(decode(column(noise(1)), 6)[0], [0], MEAN, STD, padding=4, flip=True)
    assert len({image.numpy().tobytes() for image in dataset.__getitems__([0] * 64)[0]}) > 30


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK"])
def test_other_modes_become_rgb(mode):
    file = io.BytesIO()
    noise(1)[0].convert(mode).save(file, "JPEG" if mode == "CMYK" else "PNG")
    found = decode(column([{"bytes": file.getvalue()}]), 6)[0][0]
    with PIL.open(file) as source:
        assert source.mode == mode and np.array_equal(found[..., :3], np.asarray(source.convert("RGB")))
    assert not found[..., 3].any()


def data_of(images, tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    for split in ("train", "test"):
        rows = {"image": images, "label": [i % 10 for i in range(len(images))]}
        Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
    return load(data_dir=str(tmp_path))


def test_images_of_several_sizes_go_to_the_workers(tmp_path):
    data = data_of([*noise(19, 28), *noise(1, 30)], tmp_path)
    assert data.image_size == (28, 28) and make_loaders(data, settings(batch_size=4))[2] == "workers"
    with pytest.raises(ApartError, match=r"image 19 of split 'train' \(row 19, .*\) has 30x30 pixels, others 28x28"):
        make_loaders(data, settings("memory", batch_size=4))


def test_what_works_on_single_images_goes_to_the_workers(tmp_path):
    data = data_of(noise(4, 28), tmp_path)
    augmented = settings(augmentation={"aa": None, "color_jitter": 0.0, "reprob": 0.25}, batch_size=4)
    assert make_loaders(data, settings(batch_size=4))[2] == "memory" and make_loaders(data, augmented)[2] == "workers"
    with pytest.raises(ApartError, match="--loader memory: --reprob works on single images"):
        make_loaders(data, settings("memory", augmentation=augmented.augmentation))
    cropped = settings(images=CONFIG | {"crop_pct": 0.7}, batch_size=4)
    assert make_loaders(data, cropped)[2] == "workers"
    large = settings("memory", images=CONFIG | {"input_size": (3, 224, 224)})
    with pytest.raises(ApartError, match=r"28x28 pixels are no small squares of the network's input size \(224x224\)"):
        make_loaders(data, large)


def test_a_corrupt_image_is_named(tmp_path):
    good = tmp_path / "good.png"
    noise(1)[0].save(good)
    bad = good.read_bytes()[:60]
    with pytest.raises(ApartError, match=r"image 2 of split 'train' \(row 2, column 'image'\) cannot be decoded"):
        decode(column([{"bytes": good.read_bytes()}] * 2 + [{"bytes": bad}]), 6)


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(ApartError, match=r"image 2 of split 'train' \(row 2, .*\) cannot be .*there is none"):
        data_of([*noise(2, 28), None, *noise(1, 28)], tmp_path)


@pytest.mark.parametrize("loader", ["memory", "workers"])
def test_evaluating_on_the_training_split_is_plain(loader):
    _, val, _ = make_loaders(load(val_split="train"), settings(loader))
    labels = torch.cat([labels for _, labels in val])
    assert labels.tolist() == load().train.labels().tolist()


@pytest.mark.parametrize("loader", ["memory", "workers"])
def test_the_border_of_crops_can_be_chosen(loader):
    """The demo set has none of its own: with none, each image comes whole or flipped; with 4, as few as 1 in 81 do."""
    data, plain = load(), settings(loader).images | {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    cells = data.train.cells(list(range(len(data.train))))
    whole = torch.stack([T.functional.to_tensor(rgb(cell)) for cell, _ in cells])
    known = {image.numpy().tobytes() for part in (whole, whole.flip(-1)) for image in part}
    shares = []
    for padding in (None, 0, 4):
        train_loader, _, _ = make_loaders(data, settings(loader, images=plain, padding=padding))
        images, _ = next(iter(train_loader))
        shares.append(sum(image.contiguous().numpy().tobytes() in known for image in images) / len(images))
    assert shares[0] == shares[1] == 1 and shares[2] < 0.2


def test_accelerate_shares_batches_and_epochs_advance():
    data = load()
    prepared, _, _ = make_loaders(data, settings())
    epochs = []
    for epoch in range(2):
        prepared.set_epoch(epoch)
        epochs.append([labels for _, labels in prepared])
        assert prepared.dataset.epoch == epoch
    assert len(epochs[0]) == 150 and not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))


@pytest.mark.parametrize("loader", ["memory", "workers"])
def test_both_loaders_train(loader, tmp_path):
    folder = train(TrainConfig(model="test_resnet", max_steps=2, loader=loader, output=str(tmp_path)))
    assert f"loader: {loader}" in (folder / "config.yaml").read_text()
    assert json.loads((folder / "metrics.jsonl").read_text())["train_loss"] > 0


def test_a_batch_costs_little():
    """Not a benchmark: a guard against a loop over images. Measured: see docs/DATA.md."""
    dataset = InMemoryImages(
        torch.zeros(5000, 32, 32, 4, dtype=torch.uint8), range(5000), MEAN, STD, padding=4, flip=True
    )
    start = time.perf_counter()
    for i in range(20):
        dataset.__getitems__(list(range(128 * i, 128 * i + 128)))
    assert time.perf_counter() - start < 20 * 128 / 5000  # the per-image path's own rate
