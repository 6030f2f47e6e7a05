"""A validation part cut from the training split, and a test split that is looked at once."""

import json

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from apart_hf import ApartError
from apart_hf.config.train_config import TrainConfig
from apart_hf.data.splits import Split, stratified
from apart_hf.runs.train import train
from tests.support.helpers import load, write_demo


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.floats(0.01, 0.99), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_every_class_has_its_share(labels, fraction, seed):
    labels = np.array(labels)
    try:
        rest, part = stratified(labels, fraction, seed)
    except ApartError as error:
        assert "one of every class" in str(error)
        return
    assert sorted([*rest, *part]) == list(range(len(labels))) and len(part) == round(fraction * len(labels))
    for c in np.unique(labels):
        all_of, in_part = (labels == c).sum(), (labels[part] == c).sum()
        assert abs(in_part - fraction * all_of) < 1 and 0 < in_part < all_of
    assert (stratified(labels, fraction, seed)[1] == part).all()


def test_the_part_depends_on_the_seed():
    labels = np.arange(1000) % 10
    parts = [stratified(labels, 0.1, seed)[1].tolist() for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]


def test_parts_of_the_demo_set():
    data = load(val_fraction=0.1, seed=3)
    assert (len(data.train), len(data.val), len(data.test), data.test.name) == (5400, 600, 1000, "test")
    assert np.bincount(data.val.labels()).tolist() == [60] * 10
    assert not set(data.train.rows) & set(data.val.rows)
    row = data.val.rows[0]
    assert data.val.place(0) == f"image {row} of split 'train' (row {row}, column 'image')"
    whole = load()
    assert data.val.cells([5]) == whole.train.cells([int(data.val.rows[5])])


def test_without_a_test_split(tmp_path):
    write_demo(tmp_path, train=64)
    with pytest.raises(ApartError, match=r"no split called .*--val-split, or keep a part .*--val-fraction 0\.1"):
        load(data_dir=str(tmp_path))
    data = load(data_dir=str(tmp_path), val_fraction=0.25)
    assert (len(data.train), len(data.val), data.test) == (48, 16, None)


def test_the_split_to_train_on_is_not_the_one_to_test_on():
    with pytest.raises(ApartError, match="is both --train-split and --val-split"):
        load(val_fraction=0.1, val_split="train")


def run(tmp_path, **more):
    return train(
        TrainConfig(
            model="test_resnet",
            data_dir=write_demo(tmp_path / "data", train=128, test=40),
            batch_size=16,
            groups=2,
            epochs=3,
            lr=0.02,
            val_fraction=0.25,
            output=str(tmp_path),
            **more,
        )
    )


def test_the_test_split_is_read_once_at_the_end(tmp_path, monkeypatch, spoken, capsys):
    reads, cells = [], Split.cells
    monkeypatch.setattr(Split, "cells", lambda self, rows: reads.append((self.name, len(self))) or cells(self, rows))
    folder = run(tmp_path, loader="workers")
    assert ("test", 40) not in reads[: reads.index(("test", 40))]
    first = reads.index(("test", 40))
    assert set(reads[first:]) == {("test", 40)} and set(reads[:first]) == {("train", 96), ("train", 32)}
    found = json.loads((folder / "test.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: (line["top1"], line["epoch"]))
    assert (found["split"], found["last"]["epoch"], found["best"]["epoch"]) == ("test", 3, best["epoch"])
    said = capsys.readouterr().out
    assert "evaluation is on 0.25 of split 'train'; split 'test' is looked at once" in said
    assert f"done: top-1 {found['last']['top1']:.2f} % on test" in said
    assert yaml.safe_load((folder / "config.yaml").read_text())["val_fraction"] == 0.25


def test_last_and_best_are_what_the_folders_hold(tmp_path):
    """Chosen by the loss; both results again from the exported weights, plainly."""
    import timm

    from apart_hf.data.dataset_map import TransformedImages
    from apart_hf.data.transforms import eval_transform

    folder = run(tmp_path, eval_metric="eval_loss")
    found = json.loads((folder / "test.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert found["best"]["epoch"] == min(lines, key=lambda line: line["eval_loss"])["epoch"]
    for name in ("last", "best"):
        model = timm.create_model(f"local-dir:{folder / name}", pretrained=True).eval()
        transform = eval_transform(timm.data.resolve_model_data_config(model))
        test = load(data_dir=str(tmp_path / "data")).val
        rows = TransformedImages(test, transform).__getitems__(list(range(40)))
        with torch.no_grad():
            output = model(torch.stack([image for image, _ in rows]))
        loss = torch.nn.functional.cross_entropy(output, torch.tensor([label for _, label in rows])).item()
        assert found[name]["eval_loss"] == pytest.approx(loss, rel=1e-5)
