"""Streams in class order: rows that are known are shuffled whole, and an order that cannot be mended is told."""

import itertools
import json
import logging

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PIL

from apart_hf.config.train_config import TrainConfig
from apart_hf.data import Loaders, LoaderSettings
from apart_hf.data.dataset_stream import StreamedImages
from apart_hf.data.label_order import LabelOrder
from apart_hf.runs.train import train
from tests.support.helpers import load
from tests.support.images import png
from tests.support.settings import CONFIG_16

COLOURS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}
EACH = 64


@pytest.fixture(scope="module")
def by_class(tmp_path_factory):
    """A folder of images for each class, which its colour tells."""
    folder, rng = tmp_path_factory.mktemp("by_class"), np.random.default_rng(0)
    for part, each in (("train", EACH), ("val", 10)):
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for number in range(each):
                pixels = np.array(colour) + rng.integers(-30, 30, (16, 16, 3))
                PIL.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{number:03}.png")
    return str(folder)


def stream_of(split, process=0, processes=1, **more):
    return StreamedImages(
        split, lambda image: torch.zeros(1), classes=1000, process=process, processes=processes, **more
    )


def labels_of(dataset, workers=0, batch_size=8):
    training = dataset.batches is not None
    loader = torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers, drop_last=training)
    return [batch.tolist() for _, batch in loader]


def rows(labels):
    """A table of tiny images with these labels."""
    image = {"bytes": png(size=(1, 1)), "path": None}
    features = Features({"image": Image(), "label": ClassLabel(num_classes=max(labels) + 1)})
    return Dataset.from_dict({"image": [image] * len(labels), "label": list(labels)}, features=features)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """103 rows, each of a class of its own, whose place in the table is known."""
    folder = tmp_path_factory.mktemp("numbered")
    DatasetDict(train=rows(range(103)), test=rows(range(103))).save_to_disk(str(folder))
    return load(data_dir=str(folder), streaming=True)


@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 3), (2, 0), (3, 2)])
def test_known_rows_are_shared_out_without_rest(processes, workers, numbered):
    """In evaluation all of them, in training as many full batches on each process and none twice in an epoch."""
    found = [
        labels_of(stream_of(numbered.val, p, processes, batch_size=8, workers=workers), workers)
        for p in range(processes)
    ]
    assert sorted(itertools.chain(*itertools.chain(*found))) == list(range(103))
    if processes == 1:
        assert list(itertools.chain(*found[0])) == list(range(103))  # in the split's order
    batches = 103 // (8 * processes)
    more = {"batches": batches, "batch_size": 8, "workers": workers, "buffer": 2}
    found = [labels_of(stream_of(numbered.train, p, processes, **more), workers) for p in range(processes)]
    assert [[len(batch) for batch in own] for own in found] == [[8] * batches] * processes
    seen = list(itertools.chain(*itertools.chain(*found)))
    assert len(set(seen)) == len(seen) == 8 * batches * processes


def test_known_rows_are_in_another_order_in_each_epoch_and_the_same_for_any_workers(numbered):
    orders = {}
    for epoch, seed, workers in itertools.product((0, 1), (0, 1), (0, 1, 3)):
        dataset = stream_of(numbered.train, batches=12, batch_size=8, buffer=2, seed=seed, workers=workers)
        dataset.set_epoch(epoch)
        orders.setdefault((epoch, seed), []).append(labels_of(dataset, workers))
    for order in orders.values():
        assert order[0] == order[1] == order[2]
    firsts = [list(itertools.chain(*order[0])) for order in orders.values()]
    for one, other in itertools.combinations(firsts, 2):
        assert one != other
    for first in firsts:  # as far from their places as by chance, a third of all on average
        assert 20 < np.abs(np.array(first) - np.arange(96)).mean() < 50


def test_an_epoch_longer_than_the_data_goes_on_in_another_order(numbered):
    found = list(itertools.chain(*labels_of(stream_of(numbered.train, batches=25, batch_size=8))))
    assert sorted(found[:103]) == list(range(103)) and len(set(found[103:])) == 97 and found[:97] != found[103:]


def test_augmentation_of_known_rows_is_the_same_for_any_workers(by_class):
    data = load(data_dir=by_class, streaming=True)
    found = []
    for workers in (0, 2):
        settings = LoaderSettings(CONFIG_16, 8, 8, workers=workers, shuffle_buffer=2)
        found.append(list(Loaders(data, settings, Accelerator(cpu=True)).train()))
    for (a, x), (b, y) in zip(*found, strict=True):
        assert torch.equal(a, b) and torch.equal(x, y)
    plain = Loaders(load(data_dir=by_class), LoaderSettings(CONFIG_16, 8, 8, "workers"), Accelerator(cpu=True))
    streamed = Loaders(data, LoaderSettings(CONFIG_16, 8, 8, workers=2), Accelerator(cpu=True))
    evaluated = [list(made.evaluation(made.data.val)) for made in (plain, streamed)]
    for (a, x), (b, y) in zip(*evaluated, strict=True):
        assert torch.equal(a, b) and torch.equal(x, y)


def run(folder, output, **more):
    settings = {"model": "test_resnet", "method": "standard", "batch_size": 16, "epochs": 2, "lr": 0.05}
    own = {"data_dir": folder, "output": str(output), "log_interval": 5}
    lines = (train(TrainConfig(**settings | own | more)) / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["top1"]


def test_a_folder_read_as_a_stream_trains_as_well_as_without(by_class, tmp_path, caplog):
    """With classes that are 30 times as large as the buffer, of which the last one was all that was learnt."""
    with caplog.at_level(logging.WARNING, "apart_hf"):
        assert run(by_class, tmp_path, loader="workers") == 100
        assert run(by_class, tmp_path, streaming=True, shuffle_buffer=2) == 100
    assert not caplog.records


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sorted_file_is_told_once_with_the_cure(workers, parquet, tmp_path, caplog):
    folder = parquet(train=rows([0] * 150 + [1] * 150), test=rows([0, 1] * 8))
    with caplog.at_level(logging.WARNING, "apart_hf"):
        run(folder, tmp_path, streaming=True, shuffle_buffer=20, workers=workers, img_size=32)
    (warning,) = [record.getMessage() for record in caplog.records if "order" in record.getMessage()]
    assert warning.startswith("warning: split 'train' comes in the order of its classes") and "\n" not in warning
    assert "a larger --shuffle-buffer than 20 (about 300 mend any order)" in warning
    assert "or leave --streaming out" in warning


def warned(split, *, buffer, epochs=1, workers=0):
    """What a stream says after its epochs, asked at every fifth batch as a run asks."""
    count = len(split) // 8
    dataset, said = stream_of(split, batches=count, batch_size=8, buffer=buffer, workers=workers), []
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(dataset, 8, num_workers=workers)
        for number, _ in enumerate(loader):
            if number % 5 == 0:
                said.append(dataset.warning())
        said.append(dataset.warning())
    return [text for text in said if text is not None]


def random_labels(count, share, seed=0):
    return (np.random.default_rng(seed).random(count) < share).astype(int).tolist()


@pytest.mark.parametrize(
    "labels, buffer, is_told",
    [
        ([0] * 400 + [1] * 400, 50, True),
        (np.repeat(np.arange(10), 80).tolist(), 50, True),
        ([0] * 700 + [1] * 100, 20, True),  # one class is rarer, and comes last
        ([0] * 400 + [1] * 400, 1600, False),  # the buffer holds all
        (random_labels(800, 0.5), 50, False),
        (random_labels(800, 0.02), 50, False),  # one class is rare
        (random_labels(800, 0.002), 50, False),
        ([0] * 798 + [1] * 2, 50, False),  # so rare that no order shows
        (np.random.default_rng(0).integers(0, 100, 800).tolist(), 50, False),
        ([0, 1] * 400, 1, False),
    ],
)
def test_an_order_is_told_and_nothing_else(labels, buffer, is_told, parquet):
    data = load(data_dir=parquet(train=rows(labels), test=rows([*labels[:8], max(labels)])), streaming=True)
    assert len(warned(data.train, buffer=buffer, epochs=2)) == is_told


def test_files_of_a_class_each_are_interleaved(tmp_path):
    """Of one file a class, but not where each loader process has one file alone."""
    for label in range(4):
        part = rows([label] * 100 + [3])
        part.select(range(100)).to_parquet(str(tmp_path / f"train-{label:05}-of-00004.parquet"))
    rows(range(4)).to_parquet(str(tmp_path / "test.parquet"))
    split = load(data_dir=str(tmp_path), streaming=True).train
    assert warned(split, buffer=40) == []
    (text,) = warned(split, buffer=40, workers=4)
    assert "(about 100 mend any order)" in text
    batches = labels_of(stream_of(split, batches=50, batch_size=8, buffer=40))
    assert min(len(set(batch)) for batch in batches) >= 2
    assert np.mean([len(set(batch)) for batch in batches]) > 3


def test_random_orders_give_no_false_alarm():
    """Of any number of classes, however rare, for one or several loader processes."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        for labels in (
            rng.integers(0, 2, 1000),
            rng.random(1500) < 0.01,
            rng.random(1500) < 0.003,
            rng.integers(0, 100, 1000),
            rng.zipf(1.5, 1000).clip(1, 50) - 1,
        ):
            writers = 1 + seed % 2
            shares = [LabelOrder(100, writers) for _ in range(writers)]
            for number, label in enumerate(labels):
                writer = number % writers
                shares[writer]._counts, shares[writer]._changes = shares[0]._counts, shares[0]._changes
                shares[writer].add(writer, int(label))
                if number % 200 == 199:
                    assert shares[0].same() is None, (seed, number)
