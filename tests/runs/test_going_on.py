"""What a resumed run must not do: go on with wrong settings, data or random numbers, or touch what is not its."""

import json
import os
import resource
import shutil
import signal
import subprocess
from types import SimpleNamespace

import pytest
import yaml

from apart_hf import ApartError
from apart_hf.cli.train import main
from apart_hf.runs.checkpoints import Checkpoints
from apart_hf.runs.train import train
from apart_hf.training.trainer import Trainer
from tests.support.helpers import ROOT, write_demo
from tests.support.images import write_bad
from tests.support.processes import assert_equal_runs, command, result
from tests.support.settings import settings


def cut(*_):
    raise RuntimeError("cut off")


@pytest.mark.parametrize("method", ["standard", "sam"])
def test_dropout_after_a_cut_in_the_first_evaluation(method, little, tmp_path, monkeypatch):
    """The checkpoint is of an epoch's last step: no batch of it is left."""
    more = {"method": method, "drop": 0.3, "batch_size": 24, "checkpoint_every": "1"}
    whole = train(settings(little, tmp_path / "whole", **more))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", cut)
        with pytest.raises(RuntimeError, match="cut off"):
            train(settings(little, tmp_path, **more))
    assert_equal_runs(whole, train(settings(little, tmp_path, **more, resume="auto")))


@pytest.mark.parametrize("loader, workers", [("memory", 0), ("workers", 0), ("workers", 2)])
def test_images_passed_over_are_counted_once(loader, workers, tmp_path):
    data = write_bad(tmp_path / "data", rows=40)
    more = {"on_bad_image": "skip", "loader": loader, "workers": workers, "padding": 0}
    whole = train(settings(data, tmp_path / "whole", **more))
    lines = result(whole)[0]
    assert [line["train_skipped"] for line in lines] == [2, 2]
    part = shutil.copytree(whole, tmp_path / "part/run")
    for folder in sorted((part / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(folder)
    assert_equal_runs(whole, train(settings(data, part.parent, **more, resume="auto")))


def until(run, step):
    """Without the checkpoints after a step."""
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def test_refused_settings_change_nothing(little, tmp_path, trained_here):
    one = trained_here
    until(one, 4)
    before = {path: path.read_bytes() for path in one.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ApartError, match="is of 8 images a step"):
        train(settings(little, tmp_path, batch_size=4, resume="auto", override=True))
    with pytest.raises(ApartError, match="other settings: lr"):
        train(settings(little, tmp_path, lr=0.5, resume="auto"))
    assert {path: path.read_bytes() for path in before} == before


def test_settings_are_those_of_the_checkpoint(little, tmp_path, monkeypatch):
    """A command with --override that is cut off before its first checkpoint has not changed the run."""
    one = train(settings(little, tmp_path, sched="none"))
    until(one, 4)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", cut)
        with pytest.raises(RuntimeError, match="cut off"):
            train(settings(little, tmp_path, sched="none", lr=1e-4, resume="auto", override=True))
    assert yaml.safe_load((one / "config.yaml").read_text())["lr"] == 1e-4
    with pytest.raises(ApartError, match=r"other settings: lr \(was 0.02, now 0.0001\)"):
        train(settings(little, tmp_path, sched="none", lr=1e-4, resume="auto"))
    train(settings(little, tmp_path, sched="none", resume="auto"))
    assert [line["lr"] for line in result(one)[0]] == [0.02, 0.02]


@pytest.mark.parametrize(
    "more", [{"opt": "adamw"}, {"model": "test_byobnet"}, {"model_ema": True}, {"eval_metric": "eval_loss"}]
)
def test_what_no_checkpoint_has_is_refused_also_with_override(more, little, tmp_path, trained_here):
    until(trained_here, 4)
    ((key, _),) = more.items()
    with pytest.raises(ApartError, match=f"cannot go on with {key} .*, also not by --override"):
        train(settings(little, tmp_path, **more, resume="auto", override=True))


def test_other_data_are_refused(little, tmp_path, trained_here):
    one = trained_here
    until(one, 4)
    with pytest.raises(ApartError, match="is of other data: their labels or numbers differ"):
        train(settings(write_demo(tmp_path / "more", train=90, test=30), tmp_path, resume="auto"))
    until(one, 0)
    stream = {"streaming": True, "shuffle_buffer": 10}
    two = train(settings(little, tmp_path / "stream", **stream))
    until(two, 4)
    with pytest.raises(ApartError, match=r"other settings: workers \(was 0, now 1\)"):
        train(settings(little, tmp_path / "stream", **stream, workers=1, resume="auto"))


def test_accumulation_goes_on_at_the_start_of_a_step(little, tmp_path, monkeypatch):
    """From a checkpoint at an odd number of batches to two batches a step."""
    one = train(settings(little, tmp_path, checkpoint_every="3"))
    until(one, 3)
    synced, train_step = [], Trainer.train_step

    def noted(trainer, *batch):
        found = train_step(trainer, *batch)
        synced.append(trainer.accelerator.sync_gradients)
        return found

    monkeypatch.setattr(Trainer, "train_step", noted)
    train(
        settings(little, tmp_path, checkpoint_every="3", batch_size=4, grad_accum_steps=2, resume="auto", override=True)
    )
    assert synced == [False, True] * 15  # 6 steps of the first epoch, 9 of the second


def test_a_checkpoint_that_was_not_renamed_yet_is_found(little, tmp_path, monkeypatch, trained_here):
    """A kill between the removal of an epoch's checkpoint and the renaming of its successor; others' remains go."""
    one = trained_here
    want, checkpoints = result(one), one / "checkpoints"
    until(one, 9)
    (checkpoints / "step-00000009").rename(checkpoints / ".step-00000009")
    (checkpoints / ".step-00000011").mkdir()
    steps = len(list(checkpoints.glob("step-*")))
    seen, restore = [], Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", lambda self, folder: seen.append(folder) or restore(self, folder))
    train(settings(little, tmp_path, resume="auto"))
    assert [folder.name for folder in seen] == ["step-00000009"] and result(one)[0] == want[0]
    assert not list(checkpoints.glob(".step-*")) and len(list(checkpoints.glob("step-*"))) > steps


def test_the_test_split_is_looked_at_again_after_a_longer_run(tmp_path, monkeypatch, little):
    more = {"val_fraction": 0.25, "batch_size": 9, "sched": "none"}
    one = train(settings(little, tmp_path, **more, epochs=1))
    assert json.loads((one / "test.json").read_text())["last"]["epoch"] == 1
    with monkeypatch.context() as patch:
        patch.setattr("apart_hf.runs.run.evaluate_test", cut)
        with pytest.raises(RuntimeError, match="cut off"):
            train(settings(little, tmp_path, **more, epochs=2, resume="auto", override=True))
    assert not (one / "test.json").exists()
    train(settings(little, tmp_path, **more, epochs=2, resume="auto"))
    assert json.loads((one / "test.json").read_text())["last"]["epoch"] == 2
    recorded = json.loads((one / "last/config.json").read_text())["apart"]["results"]
    assert recorded["split"] == "test" and recorded["epoch"] == 2


def test_no_room_at_the_start(little, tmp_path, trained_here):
    """Nothing is lost where a resumed run cannot write."""
    one = trained_here
    until(one, 4)
    kept = (one / "config.yaml").read_bytes()
    limits, usual = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(ApartError, match=r"^cannot write .*File too large.*; make room there"):
            train(settings(little, tmp_path, resume="auto"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, usual)
    assert (one / "config.yaml").read_bytes() == kept
    assert train(settings(little, tmp_path, resume="auto")) == one


def test_a_folder_that_is_no_run_s_is_left_alone(little, tmp_path):
    (tmp_path / "run/sub").mkdir(parents=True)
    (tmp_path / "run/thesis.txt").write_text("years")
    with pytest.raises(ApartError, match="holds other files than a run's; choose another --experiment"):
        train(settings(little, tmp_path, resume="auto"))
    assert (tmp_path / "run/thesis.txt").read_text() == "years" and len(list((tmp_path / "run").iterdir())) == 2


def test_an_empty_folder_that_was_there_stays(little, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with pytest.raises(ApartError, match="after step 1"):
        train(settings(little, tmp_path, lr=1e38, max_steps=1, resume="auto", checkpoint_every=None))
    assert (tmp_path / "run").is_dir()


def test_a_checkpoint_whose_evaluation_is_not_finite_is_not_gone_on_with(little, tmp_path):
    with pytest.raises(ApartError, match=r"the evaluation's loss is nan.*There is no checkpoint yet"):
        train(settings(little, tmp_path, lr=1e38, max_steps=1, checkpoint_every="1"))


LONG = "x" * 300


@pytest.mark.parametrize(
    "flags",
    [
        ["--checkpoint-every", "9" * 400 + "m"],
        ["--checkpoint-every", "9" * 5000],
        ["--output", LONG],
        ["--resume", LONG, "--experiment", "run"],
        ["--initial-checkpoint", LONG],
        ["--data-dir", LONG],
        ["--model-kwargs", "x=" + "-" * 100_000],
        ["--class-map", LONG],
        ["--config", LONG],
    ],
)
def test_names_and_numbers_without_end(flags, little, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = [] if "--data-dir" in flags else ["--data-dir", little]
    with pytest.raises(SystemExit) as stop:
        main(["--model", "test_resnet", "-b", "8", "--groups", "2", "--max-steps", "1", *data, *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "out of memory" not in error, error


def test_a_name_that_looks_like_mathematics(tmp_path, drawn):
    data = write_demo(tmp_path / "$\\bad{$", train=16, test=8)
    run = train(settings(data, tmp_path, epochs=1))
    assert (run / "plots/training.png").stat().st_size > 1000


def test_a_checkpoint_by_the_clock(little, tmp_path, monkeypatch):
    """Every minute, of a clock that makes three steps of one."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("apart_hf.runs.interruption.time", SimpleNamespace(monotonic=lambda: 20.0 * next(ticks)))
    run = train(settings(little, tmp_path, checkpoint_every="1m", epochs=4))
    steps = sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    assert set(steps) > {9, 18, 27, 36}  # beside those of the epochs


@pytest.mark.process
def test_a_full_disk_under_the_log(little, tmp_path):
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [str(part) for part in command(little, tmp_path, "--epochs", "1")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            cwd="/",
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=False,
        )
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("\n") == 1 and "output cannot be written (No space left on device)" in process.stderr
    assert (tmp_path / "run/last/model.safetensors").exists()


def test_every_method_goes_on_exactly(little, tmp_path):
    """Those that the cases of test_resume leave out."""
    for method in ("asam", "apart-asam", "sam-on", "ghost-bn"):
        more = {"method": method, "batch_size": 24, "checkpoint_every": "1"}
        more |= {"groups": 2} if method in ("apart-asam", "ghost-bn") else {}
        whole = train(settings(little, tmp_path / method / "whole", **more))
        part = shutil.copytree(whole, tmp_path / method / "part/run")
        until(part, 2)  # of three in an epoch
        assert_equal_runs(whole, train(settings(little, part.parent, **more, resume="auto")))
