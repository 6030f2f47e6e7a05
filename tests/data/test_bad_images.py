"""Images that cannot be decoded: named, or passed over, counted, and never a shorter batch."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image

from apart_hf import ApartError
from apart_hf.cli.train import main
from apart_hf.config.train_config import TrainConfig
from apart_hf.data import Loaders, LoaderSettings
from apart_hf.data.decoding import BadImage, rgb
from apart_hf.runs.train import train
from tests.support.helpers import load
from tests.support.images import BAD, damaged, png, write_bad
from tests.support.settings import CONFIG_16

SOURCES = {
    "memory": {"loader": "memory"},
    "workers": {"loader": "workers"},
    "two workers": {"loader": "workers", "workers": 2},
    "stream": {},
    "stream, workers": {"workers": 1},
}


def loaders(folder, source, skip=True):
    data = load(data_dir=folder, skip_bad=skip, streaming=source.startswith("stream"))
    settings = LoaderSettings(CONFIG_16, 8, 8, **SOURCES[source], skip_bad=skip)
    return data, Loaders(data, settings, Accelerator(cpu=True))


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "none", "checksum"])
def test_kinds_of_damage(kind):
    content = damaged(kind)
    with pytest.raises(BadImage):
        rgb(None if content is None else {"bytes": content, "path": None})


def test_a_file_that_is_not_there_and_one_that_may_not_be_opened(tmp_path, monkeypatch):
    with pytest.raises(BadImage):
        rgb({"bytes": None, "path": str(tmp_path / "gone.png")})

    def fails(*args, **kwargs):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("datasets.features.image.xopen", fails, raising=False)
    monkeypatch.setattr("PIL.Image.open", fails)
    with pytest.raises(OSError, match="Too many open files"):  # says nothing of the image
        rgb({"bytes": png(), "path": None})


@pytest.mark.parametrize("source", SOURCES)
def test_skipping_keeps_training_batches_full_and_evaluation_exact(source, tmp_path):
    data, made = loaders(write_bad(tmp_path), source)
    train_loader, val_loader = made.train(), made.evaluation(data.val)
    for epoch in range(2):
        train_loader.set_epoch(epoch)
        found = [(images, labels) for images, labels in train_loader]
        assert [len(images) for images, _ in found] == [8] * len(found) and len(found) == len(train_loader)
        seen = torch.cat([labels for _, labels in found]).tolist()
        assert not set(seen) & set(BAD)
        if source in ("workers", "two workers"):  # 24 rows in 3 batches
            assert len(seen) == 24 and train_loader.dataset.take_skipped() == 2
        evaluated = torch.cat([labels for _, labels in val_loader]).tolist()
        assert sorted(label for label in evaluated if label >= 0) == [i for i in range(24) if i not in BAD]
        assert val_loader.dataset.take_skipped() == 2


def test_what_is_taken_instead_can_be_drawn_again(tmp_path):
    folder = write_bad(tmp_path)
    batches = []
    for source in ("workers", "two workers"):
        loader = loaders(folder, source)[1].train()
        loader.set_epoch(3)
        batches.append(list(loader))
    for (a, x), (b, y) in zip(*batches, strict=True):
        assert torch.equal(a, b) and torch.equal(x, y)


@pytest.mark.parametrize("source", ["memory", "workers", "stream"])
def test_an_error_names_split_and_index(source, tmp_path):
    data, made = loaders(write_bad(tmp_path, kinds=("truncated", "checksum")), source, skip=False)
    with pytest.raises(ApartError, match=r"image 5 of split 'test' \(row 5, column 'image'\) cannot be decoded .*skip"):
        list(made.evaluation(data.val))


def test_a_part_names_the_place_in_the_whole_split(tmp_path):
    data = load(data_dir=write_bad(tmp_path, kinds=("truncated", "checksum")))
    part = data.val.part(np.arange(1, 24, 2)).part(np.array([2, 3]))  # rows 5 and 7
    made = Loaders(data, LoaderSettings(CONFIG_16, 8, 8, "workers"), Accelerator(cpu=True))
    with pytest.raises(ApartError, match="image 5 of split 'test'"):
        list(made.evaluation(part))


def test_nothing_but_bad_images(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(num_classes=2)})
    rows = {"image": [{"bytes": b"x", "path": None}] * 8, "label": [0, 1] * 4}
    for split in ("train", "test"):
        Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(ApartError, match="no image of split 'train' can be decoded"):
        load(data_dir=str(tmp_path), skip_bad=True)


@pytest.mark.parametrize("loader", ["memory", "workers"])
def test_a_run_reports_what_it_passed_over(loader, tmp_path, capsys, spoken):
    (tmp_path / "data").mkdir()
    folder = train(
        TrainConfig(
            model="test_resnet",
            data_dir=write_bad(tmp_path / "data"),
            batch_size=8,
            groups=2,
            epochs=2,
            loader=loader,
            on_bad_image="skip",
            output=str(tmp_path),
        )
    )
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval_skipped"] for line in lines] == [2, 2] and lines[0]["train_skipped"] == 2
    assert "epoch 2: images that cannot be decoded: 2 passed over in training, 2 left out" in capsys.readouterr().out


def test_one_line_from_a_loader_process(tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "--model",
                "test_resnet",
                "--data-dir",
                write_bad(tmp_path, kinds=("truncated", "checksum")),
                "-b",
                "8",
                "--groups",
                "2",
                "--loader",
                "workers",
                "--workers",
                "1",
                "--output",
                str(tmp_path / "out"),
            ]
        )
    error = capfd.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1, error
    assert error.startswith(f"{Path(sys.argv[0]).name}: error: image ") and "--on-bad-image skip" in error
    assert not list((tmp_path / "out").iterdir())
