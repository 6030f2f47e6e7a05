"""Classes that a run or weights record keep their order; an exported model gives the same in timm's own hands."""

import json
import shutil

import pytest
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config

from apart_hf.cli.validate import main as validate
from apart_hf.data import image_folder
from apart_hf.runs.train import train
from apart_hf.training.trainer import Trainer
from tests.support.images import write_classes
from tests.support.processes import assert_equal_runs
from tests.support.settings import settings

NAMES = ("1", "2", "10", "20", "Zebra", "ant", "a b", "\u00e9t\u00e9")
BY_CODE_POINT = sorted(NAMES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders") / "data"
    write_classes(folder, "train", "val", classes=NAMES, count=6)
    return str(folder)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    return train(
        settings(data, tmp_path_factory.mktemp("trained"), lr=0.05, epochs=3, padding=0, checkpoint_every=None)
    )


@pytest.fixture
def code_points():
    """Class folders in the order of apart_hf 0.1.0, until it is undone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_folder, "in_order", lambda names: sorted(set(names)))
        yield patch


def label_names(run):
    return json.loads((run / "last/config.json").read_text())["label_names"]


def test_the_exported_model_in_timm_s_hands(data, trained, capsys):
    """timm's reader and loader give the accuracy that is claimed on the same folder, with the class map and without."""
    assert label_names(trained) == list(timm.data.create_dataset("", f"{data}/train").reader.class_to_idx)
    assert (trained / "last/class_map.txt").read_text() == "".join(f"{name}\n" for name in label_names(trained))
    claimed = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])["top1"]
    model = timm.create_model(f"local-dir:{trained}/last", pretrained=True).eval()
    for class_map in ("", str(trained / "last/class_map.txt")):
        images = create_dataset("", f"{data}/val", class_map=class_map)
        loader = create_loader(images, batch_size=16, use_prefetcher=False, **_plain(model))
        with torch.no_grad():
            right = torch.cat([model(x).argmax(1) == y for x, y in loader])
        assert right.float().mean().item() * 100 == pytest.approx(claimed, abs=1e-4)
    assert 0 < claimed < 100 or claimed == 100
    validate(["--checkpoint", str(trained), "--data-dir", data, "--json"])
    assert json.loads(capsys.readouterr().out)["holds"]


def _plain(model):
    config = resolve_model_data_config(model)
    return {key: config[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")}


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_run_of_the_old_order_goes_on_in_it(evaluated, data, tmp_path, code_points):
    more = {"epochs": 3, "padding": 0}
    whole = train(settings(data, tmp_path / "whole", **more))
    assert label_names(whole) == BY_CODE_POINT
    part = shutil.copytree(whole, tmp_path / "part/run")
    for checkpoint in sorted((part / "checkpoints").glob("step-*"))[4 if evaluated else 1 :]:
        shutil.rmtree(checkpoint)
    (part / "checkpoints/class_map.txt").unlink()
    if not evaluated:
        shutil.rmtree(part / "last")
        shutil.rmtree(part / "best")
    code_points.undo()
    assert_equal_runs(whole, train(settings(data, part.parent, **more, resume="auto")))
    assert label_names(part) == BY_CODE_POINT


def test_a_run_keeps_its_order_in_its_first_epoch(data, tmp_path, code_points):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "evaluate", lambda *_: (_ for _ in ()).throw(RuntimeError("cut off")))
        with pytest.raises(RuntimeError, match="cut off"):
            train(settings(data, tmp_path, padding=0))
    code_points.undo()
    assert label_names(train(settings(data, tmp_path, padding=0, resume="auto"))) == BY_CODE_POINT


def test_weights_of_the_old_order_are_taken_and_measured_in_it(data, tmp_path, code_points, capsys):
    old = train(settings(data, tmp_path / "old", padding=0, epochs=3, lr=0.05))
    code_points.undo()
    validate(["--checkpoint", str(old), "--data-dir", data, "--json"])
    assert json.loads(capsys.readouterr().out)["holds"]
    weights = str(old / "last/model.safetensors")
    for more in ({"initial_checkpoint": weights}, {"model": f"local-dir:{old}/last", "pretrained": True}):
        new = train(settings(data, tmp_path / str(len(more)), padding=0, epochs=1, max_steps=1, lr=1e-9, **more))
        assert label_names(new) == BY_CODE_POINT
        found = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"] for run in (old, new)]
        assert found[1] == pytest.approx(found[0], rel=0.2)


def test_weights_of_other_classes_change_no_order(data, trained, tmp_path):
    other = write_classes(tmp_path / "other", "train", "val", classes=("10", "9"), count=6)
    new = train(
        settings(other, tmp_path, epochs=1, max_steps=1, initial_checkpoint=f"{trained}/last/model.safetensors")
    )
    assert label_names(new) == ["9", "10"]
