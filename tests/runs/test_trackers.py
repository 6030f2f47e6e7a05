"""Trackers are told what metrics.jsonl and the trainer say, under the run's name, in its folder, once for each step."""

import json
import shutil
from pathlib import Path

import accelerate.tracking
import pytest
import yaml

from apart_hf import ApartError
from apart_hf.cli.train import main
from apart_hf.config.train_config import TrainConfig
from apart_hf.runs.trackers import FILE
from apart_hf.runs.train import train
from apart_hf.training.trainer import Trainer
from tests.support.helpers import write_demo
from tests.support.processes import assert_equal_runs
from tests.support.settings import settings

EPOCH_STEPS, STEPS = 9, 18  # 72 images in batches of 8, twice
EPOCH = {
    "train_loss": "train/epoch_loss",
    "train_top1": "train/epoch_top1",
    "images_per_second": "train/images_per_second",
    "seconds": "train/epoch_seconds",
    "eval_loss": "eval/loss",
    "top1": "eval/top1",
    "top5": "eval/top5",
}


def scalars(run, project="apart_hf"):
    """{tag: [(step, value)]} of tensorboard, the hyper-parameters of the run, and their names by type."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(run / project), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, events


def hyper_parameters(events):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder of its own, to see that nothing is written there."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def steps(monkeypatch):
    """(loss, learning rate, images) of each step of the trainer."""
    found, train_step = [], Trainer.train_step

    def recorded(self, images, targets, share=1.0):
        loss, output = train_step(self, images, targets, share)
        found.append((loss.item(), self.optimizer.param_groups[0]["lr"], len(images)))
        return loss, output

    monkeypatch.setattr(Trainer, "train_step", recorded)
    return found


def check_curves(found, run, steps, interval=2):
    """By step what the trainer saw, by epoch what metrics.jsonl has; one axis, of optimizer steps."""
    due = list(range(interval, STEPS + 1, interval))
    assert found["lr"] == [(step, pytest.approx(steps[step - 1][1])) for step in due]
    losses = [sum(loss for loss, *_ in steps[step - interval : step]) / interval for step in due]
    assert found["train/loss"] == [(step, pytest.approx(loss)) for step, loss in zip(due, losses)]
    for tag in ("train/top1", "train/grad_norm", "train/perturbed_loss", "train/zero_deltas"):
        assert [step for step, _ in found[tag]] == due
    assert all(value > 0 for tag in ("train/grad_norm", "train/perturbed_loss") for _, value in found[tag])
    ends, written = [EPOCH_STEPS, STEPS], lines(run)
    assert found["epoch"] == [(step, line["epoch"]) for step, line in zip(ends, written)]
    for key, tag in EPOCH.items():
        assert found[tag] == [(step, pytest.approx(line[key])) for step, line in zip(ends, written)], tag


def test_tensorboard(little, tmp_path, here, steps):
    more = {"method": "apart", "groups": 2, "sched": "cosine", "log_interval": 2, "report_to": ["tensorboard"]}
    run = train(settings(little, tmp_path / "out", **more))
    found, events = scalars(run)
    check_curves(found, run, steps)
    assert not list(here.iterdir()) and [path.parent for path in run.rglob("events.*")] == [run / "apart_hf"]
    written = yaml.safe_load((run / "config.yaml").read_text())
    stored = hyper_parameters(events)
    assert stored == {
        key: " ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in written.items()
        if value is not None
    }
    assert stored["amp"] is False and stored["groups"] == 2.0 and stored["lr"] == 0.02 and "clip_grad" not in stored
    kept = yaml.safe_load((run / "apart_hf/hparams.yml").read_text())
    assert kept == {key: value for key, value in written.items() if value is not None}
    assert {type(kept[key]) for key in ("amp", "groups", "lr", "opt", "report_to")} == {bool, int, float, str, list}
    # and training is what it is without
    plain = train(settings(little, tmp_path / "plain", **more | {"report_to": None}))
    assert_equal_runs(run, plain)


def until(run, step):
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


@pytest.mark.parametrize("step", [EPOCH_STEPS, 12])
def test_a_resumed_run_goes_on_in_the_same_curves(step, little, tmp_path, steps):
    more = {"method": "apart", "groups": 2, "log_interval": 2, "report_to": ["tensorboard"], "drop": 0.1}
    run = train(settings(little, tmp_path, **more))
    before, _ = scalars(run)
    known = json.loads((run / FILE).read_text())
    until(run, step)
    train(settings(little, tmp_path, **more, resume="auto"))
    found, events = scalars(run)
    times = ("train/epoch_seconds", "train/images_per_second")
    assert {tag: curve for tag, curve in found.items() if tag not in times} == {
        tag: curve for tag, curve in before.items() if tag not in times
    }
    check_curves(found, run, steps[:STEPS])
    assert json.loads((run / FILE).read_text()) == known and hyper_parameters(events)["method"] == "apart"
    assert len(list((run / "apart_hf").glob("events.*"))) == 2


def test_a_run_that_starts_anew_in_its_folder_takes_its_curves_back(little, tmp_path, monkeypatch):
    """It was cut off before its first checkpoint."""
    more = {"log_interval": 1, "report_to": ["tensorboard"], "checkpoint_every": None}
    evaluate = Trainer.evaluate

    def cut(*_):
        raise RuntimeError("cut off")

    monkeypatch.setattr(Trainer, "evaluate", cut)
    monkeypatch.setattr("apart_hf.runs.run.Run._discard_if_empty", lambda self: None)  # as after a kill
    with pytest.raises(RuntimeError, match="cut off"):
        train(settings(little, tmp_path, **more))
    first = json.loads((tmp_path / "run" / FILE).read_text())
    assert len(scalars(tmp_path / "run")[0]["train/loss"]) == EPOCH_STEPS
    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    run = train(settings(little, tmp_path, **more, resume="auto"))
    found, _ = scalars(run)
    assert [step for step, _ in found["train/loss"]] == list(range(1, STEPS + 1))
    assert json.loads((run / FILE).read_text())["id"] != first["id"]


def test_the_test_split_s_results(little, tmp_path):
    run = train(settings(little, tmp_path, val_fraction=0.25, report_to=["tensorboard"], epochs=1))
    found, _ = scalars(run)
    results = json.loads((run / "test.json").read_text())["last"]
    for key, tag in (("eval_loss", "test/loss"), ("top1", "test/top1"), ("top5", "test/top5")):
        assert found[tag] == [(6, pytest.approx(results[key]))]


def test_images_and_steps_passed_over(little, tmp_path):
    more = {"on_nonfinite": "skip", "on_bad_image": "skip", "epochs": 1}
    run = train(settings(little, tmp_path, report_to=["tensorboard"], **more))
    found, _ = scalars(run)
    for tag in ("train/skipped_images", "train/skipped_steps", "eval/skipped"):
        assert found[tag] == [(EPOCH_STEPS, 0)]


def test_a_project_of_one_s_own(little, tmp_path):
    run = train(settings(little, tmp_path, project="birds", report_to=["tensorboard"], epochs=1, max_steps=1))
    assert scalars(run, "birds")[0]["eval/top1"] and not (run / "apart_hf").exists()


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "a:b",
        "a\0b",
        "a\n",
        "x" * 129,
        "best",
        "checkpoints",
        "hub",
        "last",
        "plots",
    ],
)
def test_what_is_no_project(name):
    with pytest.raises(ApartError, match=r"--project .*: must be a plain name of 1 to 128 characters"):
        TrainConfig(project=name)


def test_a_tracker_that_does_not_start(tmp_path, here, monkeypatch, capsys):
    pytest.importorskip("tensorboard")

    def start(self):
        raise PermissionError("no API key\nconfigured")

    monkeypatch.setattr(accelerate.tracking.TensorBoardTracker, "start", start)
    data = write_demo(tmp_path / "data", train=16, test=8)
    with pytest.raises(SystemExit) as stop:
        flags = "--model test_resnet -b 8 --groups 2 --threads 1 --report-to tensorboard --output out --data-dir"
        main([*flags.split(), data])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "--report-to tensorboard: a tracker does not start (no API key" in said and "WANDB_MODE=offline" in said
    assert not list(Path("out").iterdir())


def test_trackers_end_with_a_run_that_fails(little, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    ended, finish = [], accelerate.tracking.TensorBoardTracker.finish
    monkeypatch.setattr(accelerate.tracking.TensorBoardTracker, "finish", lambda self: ended.append(1) or finish(self))
    with monkeypatch.context() as patch:
        patch.setattr("apart_hf.runs.run.Run.save", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(settings(little, tmp_path, report_to=["tensorboard"]))
    assert len(ended) == 1
    train(settings(little, tmp_path, report_to=["tensorboard"], epochs=1, max_steps=1, experiment="other"))
    assert len(ended) == 2


OPTIONS = {"method": "apart", "groups": 2, "sched": "cosine", "log_interval": 2}


def leveldb_records(content):
    """Of a log in LevelDB's format, as wandb writes it: blocks of 32 KiB, and records that may go over several."""
    place, parts = 7, []  # after wandb's own header
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def test_wandb_offline(little, tmp_path, here, steps, monkeypatch):
    """Read from its files; a resumed run has the same id, and no file of the working folder is touched."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def read(file):
        """(the run, {key: [(step, value)]}, configuration)"""
        wandb.teardown()  # the process that writes
        curves, config, run = {}, {}, None
        for content in leveldb_records(file.read_bytes()):
            record = Record.FromString(content)
            run = record.run if record.HasField("run") else run
            for item in [*record.run.config.update, *record.config.update]:
                config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            row = {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
            for key, value in row.items():
                curves.setdefault(key, []).append((row["_step"], value))
        return run, curves, config

    more = OPTIONS | {"report_to": ["wandb"]}
    folder = train(settings(little, tmp_path / "out", **more))
    assert wandb.run is None and not list(here.iterdir())
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    run, curves, config = read(file)
    assert (run.project, run.display_name) == ("apart_hf", "run")
    check_curves(curves, folder, steps)
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert {key: config.get(key) for key in written} == written
    assert run.run_id == json.loads((folder / FILE).read_text())["id"]
    until(folder, 12)
    train(settings(little, tmp_path / "out", **more, resume="auto"))
    second = next(one for one in folder.glob("wandb/offline-run-*/*.wandb") if one != file)
    again, rest, _ = read(second)
    assert again.run_id == run.run_id and not list(here.iterdir())
    assert rest["train/loss"] == [(step, value) for step, value in curves["train/loss"] if step > 12]


def test_trackio_offline(little, tmp_path, here, steps, monkeypatch):
    """Read from its database; of two runs of one name, a resumed one goes on in its own."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    more = OPTIONS | {"report_to": ["trackio"]}

    def read(folder):
        known = json.loads((folder / FILE).read_text())["trackio"]
        rows = sqlite_storage.SQLiteStorage.get_logs("apart_hf", "run", run_id=known)
        curves = {}
        for row in rows:
            for key, value in row.items():
                curves.setdefault(key, []).append((row["step"], value))
        return curves, sqlite_storage.SQLiteStorage.get_run_config("apart_hf", "run", run_id=known), known

    folder = train(settings(little, tmp_path / "out", **more))
    curves, config, known = read(folder)
    check_curves(curves, folder, steps)
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert {key: config.get(key) for key in written} == written
    until(folder, 12)
    train(settings(little, tmp_path / "out", **more, resume="auto"))
    curves, _, again = read(folder)
    assert again == known and {step for step, _ in curves["lr"]} == set(range(2, STEPS + 1, 2))
    other = train(settings(little, tmp_path / "other", **more))
    assert read(other)[2] != known
    until(folder, 12)
    train(settings(little, tmp_path / "out", **more, resume="auto"))
    assert len(read(other)[0]["lr"]) == STEPS / 2 and not list(here.iterdir())
