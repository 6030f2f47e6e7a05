"""Measuring a model again on folders of any layout, and messages that name only flags which the command has."""

import json
import re
import shutil

import pytest

from apart_hf.cli import validate
from apart_hf.cli.validate import main
from apart_hf.runs.train import train
from tests.support.images import write_classes, write_images
from tests.support.settings import settings

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("data") / "set", "train", "val", classes=NAMES, count=4)


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return str(train(settings(data, folder, epochs=1, padding=0, lr=0.05, checkpoint_every=None)))


def measured(capsys, *flags):
    main([*flags, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("layout", ["val", "test", "Testing", "classes", "images/val"])
def test_any_layout_can_be_measured(layout, data, model, tmp_path, capsys):
    whole = measured(capsys, "--checkpoint", model, "--data-dir", data, "--val-split", "val")
    assert whole["holds"] and whole["split"] == "val" and whole["images"] == 12
    folder = tmp_path / "set"
    shutil.copytree(f"{data}/val", folder if layout == "classes" else folder / layout)
    found = measured(capsys, "--checkpoint", model, "--data-dir", str(folder))
    assert (found["top1"], found["eval_loss"]) == (whole["top1"], pytest.approx(whole["eval_loss"]))
    streamed = measured(capsys, "--checkpoint", model, "--data-dir", str(folder), "--streaming")
    assert streamed["top1"] == whole["top1"]


def test_a_folder_of_some_classes(data, model, tmp_path, capsys):
    shutil.copytree(f"{data}/val/c", tmp_path / "test/c")
    found = measured(capsys, "--checkpoint", model, "--data-dir", str(tmp_path))
    assert found["images"] == 4
    parts = [found]
    for name in ("a", "b"):
        shutil.copytree(f"{data}/val/{name}", tmp_path / f"{name}/test/{name}")
        parts.append(measured(capsys, "--checkpoint", model, "--data-dir", str(tmp_path / name)))
    whole = measured(capsys, "--checkpoint", model, "--data-dir", data)
    for key in ("top1", "eval_loss"):
        assert sum(part[key] for part in parts) / 3 == pytest.approx(whole[key], rel=1e-5)


def test_the_name_that_datasets_gives_a_split_still_finds_it(data, model, capsys):
    assert measured(capsys, "--checkpoint", model, "--data-dir", data, "--val-split", "validation")["split"] == "val"


def test_every_flag_that_a_message_names_is_there(data, model, tmp_path, capsys):
    write_classes(tmp_path / "others", "val", classes=("x", "y"))
    write_classes(tmp_path / "two", "val", "valid", classes=NAMES)
    write_images(tmp_path / "flat", "1.png")
    write_images(tmp_path / "bad", "val/a/", "val/b/", "val/c/")
    (tmp_path / "bad/val/a/0.png").write_bytes(b"no image")
    bad = [
        ("--data-dir", tmp_path / "others"),
        ("--data-dir", tmp_path / "two"),
        ("--data-dir", tmp_path / "flat"),
        ("--data-dir", tmp_path / "bad"),
        ("--data-dir", tmp_path / "nowhere"),
        ("--data-dir", data, "--val-split", "holdout"),
        ("--data-dir", data, "--input-key", "picture"),
        ("--data-dir", data, "--target-key", "kind"),
        ("--data-dir", data, "--dataset-config", "large"),
        ("--dataset", "demo"),
        ("--dataset", "dmeo"),
    ]
    known = set(re.findall(r"--[a-z-]+", _help(capsys)))
    for flags in bad:
        with pytest.raises(SystemExit) as stop:
            main(["--checkpoint", model, *map(str, flags)])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1, said
        assert set(re.findall(r"--[a-z-]+", said)) <= known, said


def _help(capsys):
    with pytest.raises(SystemExit):
        validate.main(["--help"])
    return capsys.readouterr().out
