"""A run that was cut off goes on exactly: weights and metrics bit for bit those of a run that was not."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from apart_hf import ApartError
from apart_hf.config.arguments import parse_arguments
from apart_hf.runs.checkpoints import damage
from apart_hf.runs.folder import RunFolder
from apart_hf.runs.interruption import EXIT_CODE
from apart_hf.runs.train import train
from apart_hf.training.epoch_metrics import Evaluation
from tests.support.helpers import PUSHED, REPO, ROOT, arrived
from tests.support.processes import TRAIN, assert_equal_runs, command, latest, result, start, wait_for_checkpoint
from tests.support.settings import settings

CASES = {
    "standard": {"method": "standard", "drop": 0.3, "mixup": 0.2},
    "apart": {"method": "apart", "groups": 2, "ratio": 0.5, "model_ema": True, "every": 2},
    "apart, workers": {"method": "apart", "groups": 2, "loader": "workers", "workers": 1, "reprob": 0.5},
    "apart, stream": {"method": "apart", "groups": 2, "streaming": True, "shuffle_buffer": 20},
    "sam": {"method": "sam", "grad_accum_steps": 2, "opt": "adamw", "lr": 1e-3, "checkpoint_every": "1"},
    "apart-sam": {"method": "apart-sam", "groups": 2, "amp_dtype": "bfloat16", "sched": "cosine", "warmup_epochs": 1},
    "random-bn": {"method": "random-bn", "groups": 2, "val_fraction": 0.25, "batch_size": 9, "ratio": 2 / 3},
}


@pytest.mark.parametrize("case", CASES)
def test_from_any_checkpoint_on_nothing_differs(case, little, tmp_path):
    whole = train(settings(little, tmp_path / "whole", **CASES[case]))
    steps = sorted(path.name for path in (whole / "checkpoints").glob("step-*"))
    assert len(steps) > 5
    for number, keep in enumerate([1, len(steps) // 2]):
        part = shutil.copytree(whole, tmp_path / f"part{number}" / "run")
        for name in steps[keep:]:
            shutil.rmtree(part / "checkpoints" / name)
        again = train(settings(little, part.parent, **CASES[case], resume="auto"))
        assert again == part
        assert_equal_runs(whole, again)


def test_the_case_without_a_checkpoint_starts_anew(little, tmp_path):
    one = train(settings(little, tmp_path))
    shutil.rmtree(one / "checkpoints")
    before = result(one)
    train(settings(little, tmp_path, resume="auto"))
    assert result(one)[0] == before[0]


def test_a_finished_run_says_so(little, tmp_path, capsys, spoken):
    one = train(settings(little, tmp_path))
    stamp = (one / "last/model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert train(settings(little, tmp_path, resume=str(one))) == one
    assert "is finished: 2 epochs, 18 steps" in capsys.readouterr().out
    assert (one / "last/model.safetensors").stat().st_mtime_ns == stamp


def test_auto_means_the_last_run_of_the_name(little, tmp_path, monkeypatch):
    """Without --experiment a further run is numbered, and it is that one which was cut off."""
    data, output = little, tmp_path / "out"
    more = {"experiment": None, "epochs": 1}
    first = train(settings(data, output, **more))
    second = train(settings(data, output, **more, seed=1))
    assert second.name == f"{first.name}-2"
    for checkpoint in sorted((second / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(checkpoint)
    before = (first / "metrics.jsonl").stat().st_mtime_ns
    whole = shutil.copytree(second, tmp_path / "whole")
    assert train(settings(data, output, **more, seed=1, resume="auto")) == second
    assert_equal_runs(whole, second)
    assert (first / "metrics.jsonl").stat().st_mtime_ns == before
    other = train(settings(data, output, **more, method="sam", resume="auto"))
    assert other.name == first.name.replace("standard", "sam")  # there was none: it starts anew


def test_a_run_that_was_cut_off_before_it_was_pushed(hub, quickly, little, tmp_path, capsys, spoken):
    train(settings(little, tmp_path, epochs=1))
    train(settings(little, tmp_path, epochs=1, resume="auto", push_to_hub=REPO))
    assert "is finished" in capsys.readouterr().out and arrived(hub) == PUSHED


def test_a_longer_run_goes_on(little, tmp_path):
    train(settings(little, tmp_path, sched="none"))
    with pytest.raises(ApartError, match=r"other settings: epochs \(was 2, now 3\).*--override"):
        train(settings(little, tmp_path, sched="none", resume="auto", epochs=3))
    longer = train(settings(little, tmp_path, sched="none", resume="auto", epochs=3, override=True))
    fresh = train(settings(little, tmp_path / "fresh", sched="none", epochs=3))
    assert_equal_runs(fresh, longer)


@pytest.mark.parametrize("harm", ["cut", "flipped", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(harm, little, tmp_path, capsys, spoken):
    one = train(settings(little, tmp_path))
    want = result(one)
    latest = sorted((one / "checkpoints").glob("step-*"))[-1]
    file = latest / "optimizer.bin"
    content = file.read_bytes()
    if harm == "cut":
        file.write_bytes(content[:-1])
    elif harm == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        (latest / "manifest.json" if harm == "no manifest" else file).unlink()
    assert damage(latest)
    train(settings(little, tmp_path, resume="auto"))
    assert f"checkpoint {latest.name} is passed over" in capsys.readouterr().out
    assert result(one)[0] == want[0]


def kept(run):
    return [int(path.name.removeprefix("step-")) for path in sorted((run / "checkpoints").glob("step-*"))]


def test_old_checkpoints_go_but_for_that_of_the_best_epoch(little, tmp_path, monkeypatch):
    losses = [3.0, 1.0, 2.0, 2.5]
    found = iter([*losses, *losses[2:]])
    monkeypatch.setattr("apart_hf.training.trainer.evaluate", lambda *_: Evaluation(next(found), 0.0, 0.0))
    more = {"checkpoint_hist": 2, "eval_metric": "eval_loss", "epochs": 4}
    one = train(settings(little, tmp_path, **more))
    assert kept(one) == [18, 34, 36]
    for folder in sorted((one / "checkpoints").glob("step-*"))[1:]:
        (folder / "run.pt").unlink()
    # back to the best one, which is still known as such; the damaged ones of later steps do not take the place of new
    train(settings(little, tmp_path, **more, resume="auto"))
    assert kept(one) == [18, 34, 36] and [line["eval_loss"] for line in result(one)[0]] == losses
    assert all(damage(folder) is None for folder in (one / "checkpoints").glob("step-*"))


def test_what_cannot_be_resumed(little, tmp_path):
    with pytest.raises(ApartError, match=r"--resume nowhere: there is no checkpoint"):
        train(settings(little, tmp_path, resume="nowhere"))
    one = train(settings(little, tmp_path))
    from apart_hf.runs.checkpoints import Checkpoints

    folder = sorted((one / "checkpoints").glob("step-*"))[-1]
    import torch

    shared = torch.load(folder / "run.pt", weights_only=True) | {"processes": 2}
    torch.save(shared, folder / "run.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    from apart_hf.utils.files import sha256

    (folder / "manifest.json").write_text(json.dumps(manifest | {"run.pt": sha256(folder / "run.pt")}))
    with pytest.raises(ApartError, match=r"is of 2 process\(es\), and 1 were started"):
        train(settings(little, tmp_path, resume="auto"))
    assert Checkpoints(one / "checkpoints", None).newest()[0] == folder


def test_a_full_disk_costs_a_checkpoint_and_no_more(little, tmp_path):
    """No file may grow beyond 100 KB: weights cannot be written, training goes on where it can."""
    code = (
        "import resource, sys; from apart_hf.cli.train import main; import apart_hf.runs.checkpoints as c\n"
        "write = c.Checkpoints._write\n"
        "def limited(self, *args):\n"
        "    small = len(self.all()) >= 1\n"
        "    if small: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "    try: write(self, *args)\n"
        "    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "c.Checkpoints._write = limited\n"
        "main(sys.argv[1:])"
    )
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "--model",
            "test_resnet",
            "--method",
            "standard",
            "--data-dir",
            little,
            "-b",
            "8",
            "--epochs",
            "1",
            "--checkpoint-every",
            "3",
            "--output",
            str(tmp_path),
            "--experiment",
            "run",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "warning: no checkpoint at step 6" in result.stdout and "step-00000003 stays" in result.stdout
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000003"]
    assert damage(tmp_path / "run/checkpoints/step-00000003") is None


def test_no_room_for_the_weights_of_an_epoch(little, tmp_path, monkeypatch):
    whole = train(settings(little, tmp_path / "whole"))
    write = RunFolder._export

    def limited(*arguments):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_export", limited)
        with pytest.raises(ApartError, match=r"^cannot write .*run \(.*File too large.*\); make room there,.*--resume"):
            train(settings(little, tmp_path))
    assert not (tmp_path / "run/last").exists() and latest(tmp_path / "run").name == "step-00000008"
    assert_equal_runs(whole, train(settings(little, tmp_path, resume="auto")))


# -- real processes ---------------------------------------------------------------------------------------------------


def live(little, output, rng, *, kill, writing):
    """One process, to its end or killed: in the midst of writing a checkpoint, or of what comes after one."""

    def found(pattern):
        return set((output / "run/checkpoints").glob(pattern))

    def wait(condition):
        while process.poll() is None and not condition():
            time.sleep(0.001)

    before, left = found("step-*"), found(".step-*")
    process = start(command(little, output))
    if kill:
        wait(lambda: found("step-*") - before)
        if writing:
            wait(lambda: found(".step-*") - left)
        time.sleep(rng.uniform(0.0, 0.02 if writing else 0.5))
        process.kill()
    out, error = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL or "done: " in out or "is finished" in out, error
    return process.returncode


def killed(number, little, whole, tmp_path):
    """SIGKILL so many times; each run that comes to its end is compared with `whole`."""
    rng, kills, runs, finished = random.Random(number), 0, 0, False
    while kills < number or not finished:
        output = tmp_path / str(runs)
        finished = live(little, output, rng, kill=kills < number, writing=kills % 2 == 0) == 0
        if finished:
            assert_equal_runs(whole, output / "run")
            runs += 1
        else:
            kills += 1


@pytest.fixture(scope="module")
def whole(little, tmp_path_factory):
    return train(parse_arguments(command(little, tmp_path_factory.mktemp("whole"))[len(TRAIN) :]))


def test_killed_at_a_random_moment(little, whole, tmp_path):
    killed(1, little, whole, tmp_path)


@pytest.mark.slow
def test_killed_twenty_times(little, whole, tmp_path):
    killed(20, little, whole, tmp_path)


@pytest.mark.parametrize(
    "name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow), pytest.param("SIGUSR1", marks=pytest.mark.slow)]
)
def test_a_signal_stops_at_a_checkpoint(name, little, whole, tmp_path):
    process = start(command(little, tmp_path))
    wait_for_checkpoint(process, tmp_path / "run")
    process.send_signal(getattr(signal, name))
    _, error = process.communicate(timeout=300)
    assert process.returncode == EXIT_CODE == 75
    assert error.count("\n") == 1 and f"stopped by {name} after step" in error and "--resume auto" in error
    step = int(error.split("after step ")[1].split(";")[0])
    assert (tmp_path / f"run/checkpoints/step-{step:08}").exists()
    second = start(command(little, tmp_path))
    assert second.wait(timeout=300) == 0, second.communicate()
    assert_equal_runs(whole, tmp_path / "run")


def test_two_runs_into_one_folder(little, tmp_path):
    """That a lock of the dead is none is seen wherever a killed run goes on."""
    first = start(command(little, tmp_path, "--epochs", "500"))
    try:
        wait_for_checkpoint(first, tmp_path / "run")
        second = start(command(little, tmp_path, "--epochs", "500"))
        _, error = second.communicate(timeout=300)
        assert second.returncode == 2 and "is in use by another run (process " in error and error.count("\n") == 1
    finally:
        first.kill()
        first.communicate()
