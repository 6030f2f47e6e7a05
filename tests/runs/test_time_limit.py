"""A run with --time-limit stops at a checkpoint in time, counted from the start of its process, and goes on exactly."""

import signal
import time
from types import SimpleNamespace

import psutil
import pytest

from apart_hf import ApartError, TrainConfig
from apart_hf.cli.train import main
from apart_hf.config.durations import seconds_of
from apart_hf.runs import time_limit
from apart_hf.runs.checkpoints import MANIFEST, Checkpoints, damage
from apart_hf.runs.interruption import EXIT_CODE, Interrupted, StopRequest
from apart_hf.runs.time_limit import MARGIN, SAFETY, TimeLimit
from apart_hf.runs.train import train
from apart_hf.training.trainer import Trainer
from tests.support.processes import assert_equal_runs, command, fork, fork_ranks, latest
from tests.support.settings import settings

AGE, STEP, SAVE, EVALUATION = 4.0, 1.0, 2.0, 3.0


@pytest.fixture
def clock(monkeypatch):
    """A clock that steps, checkpoints and evaluations alone move; the process is `AGE` old when it begins."""
    clock = SimpleNamespace(now=0.0, steps=0, alarm=float("inf"))
    ours = SimpleNamespace(monotonic=lambda: clock.now, sleep=time.sleep)
    for module in ("time_limit", "interruption"):
        monkeypatch.setattr(f"apart_hf.runs.{module}.time", ours)
    monkeypatch.setattr(time_limit, "age", lambda: AGE + clock.now)

    def slow(kind, name, seconds):
        call = getattr(kind, name)

        def longer(self, *arguments, **named):
            clock.now += seconds
            clock.steps += kind is Trainer and name == "train_step"
            if clock.now > clock.alarm:
                signal.raise_signal(signal.SIGALRM)
            return call(self, *arguments, **named)

        monkeypatch.setattr(kind, name, longer)

    slow(Trainer, "train_step", STEP)
    slow(Trainer, "evaluate", EVALUATION)
    slow(Checkpoints, "save", SAVE)
    return clock


def steps_made(clock, limit, config):
    """Train until the limit stops it; how many steps that were, and the seconds that were left. None: it finished."""
    clock.now, clock.steps, clock.alarm = 0.0, 0, limit - AGE - MARGIN
    try:
        train(config)
    except Interrupted as stopped:
        assert str(stopped).startswith(f"stopped by --time-limit {limit}s "), stopped
        return clock.steps, limit - AGE - clock.now
    return None


@pytest.mark.parametrize("more", [{}, {"checkpoint_every": None}], ids=["checkpoints", "none within epochs"])
def test_it_stops_in_time_and_goes_on_exactly(more, trained, little, tmp_path, clock):
    """The longest that may follow a step is measured, and what was measured at first is not known before."""
    limit, parts = 26, []
    while found := steps_made(clock, limit, settings(little, tmp_path, time_limit=f"{limit}s", resume="auto", **more)):
        parts.append(found)
        assert len(parts) < 10
        _, left = found
        assert left >= MARGIN - EVALUATION  # this clock tells only at its end that one takes too long
        # neither was one step given away: another one, with its checkpoint, or the epoch's end, would not have fitted
        assert left - SAVE - STEP < MARGIN + SAFETY * (STEP + EVALUATION + 2 * SAVE) + time_limit.PICTURES
        assert damage(latest(tmp_path / "run")) is None
    assert len(parts) >= 2 and sum(steps for steps, _ in parts) >= 9
    assert_equal_runs(trained, tmp_path / "run")


def test_the_first_step_of_a_process_tells_what_a_checkpoint_takes(little, tmp_path, clock):
    """Else nobody would know, before the end of an epoch, how long one takes."""
    config = settings(little, tmp_path, checkpoint_every=None, max_steps=3, time_limit="1h")
    run = train(config)
    assert [one.name for one in sorted((run / "checkpoints").glob("step-*"))] == ["step-00000001", "step-00000003"]
    plain = train(settings(little, tmp_path / "other", checkpoint_every=None, max_steps=3))
    assert [one.name for one in (plain / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert "time_limit" not in (run / "config.yaml").read_text()  # it is of this process alone
    assert_equal_runs(run, plain)


@pytest.mark.parametrize("beyond, stops", [(0.1, False), (-0.1, True)])
def test_there_is_time_for_what_comes_next(beyond, stops, clock):
    """After steps of 2 and 4 s, the first one of 30 s, and a checkpoint of 3 s."""
    limit = TimeLimit(100, "100s")
    for seconds in (30.0, 2.0, 4.0):  # the first one may be compiled
        limit.resume()
        clock.now += seconds
        limit.end_step()
    limit.end_checkpoint(3.0)
    assert (limit.step, limit.left) == (4.0, 60.0)

    def leave(needed):
        clock.now = 100 - AGE - MARGIN - needed - beyond

    leave(SAFETY * (4 + 3))
    assert limit.is_short_for_a_step() is stops
    leave(SAFETY * (2.5 * 4 + 30 + 3))
    assert limit.is_short_for_the_end_of_an_epoch(images=2.5, last=False) is stops
    leave(SAFETY * 3)
    assert limit.is_short_for_the_end_of_an_epoch(images=None, last=False) is stops
    limit.resume()
    clock.now += 7  # what the end of an epoch took
    limit.end_epoch(evaluated=True)
    leave(SAFETY * 7 + time_limit.PICTURES)
    assert limit.is_short_for_the_end_of_an_epoch(images=2.5, last=True) is stops


def test_a_limit_that_is_over_before_the_first_step(little, tmp_path, capsys):
    """This process is older than a second."""
    flags = ["--data-dir", little, "--model", "test_resnet", "-b", "8", "--groups", "2", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--experiment", "run", "--time-limit", "1s"])
    error = capsys.readouterr().err
    assert ended.value.code == EXIT_CODE and error.count("\n") == 1
    assert (
        "stopped by --time-limit 1s before a training step: preparing the run has taken " in error
        and "more time is needed" in error
    )
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_stopped(trained_here, little, tmp_path, clock):
    assert train(settings(little, tmp_path, time_limit="60s", resume="auto")) == trained_here


@pytest.mark.parametrize("text, seconds", [("90", 90), ("90s", 90), ("10m", 600), ("2h", 7200)])
def test_times(text, seconds):
    assert seconds_of("--time-limit", text) == seconds == TrainConfig(time_limit=text).time_limit_seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0m", "-5m", "1.5h", "10 m", "m", "10d", "10M", "1e3", "\u0661m", "9999999999", "inf"]
)
def test_what_is_no_time(text):
    with pytest.raises(ApartError, match=r"^--time-limit '.*': a whole number above 0 of seconds \(90s\), minutes"):
        TrainConfig(time_limit=text)


class Joined:
    """An accelerator of two processes, of which the other one asks for (signals, limits)."""

    num_processes, device = 2, "cpu"

    def __init__(self, *other):
        self.other = other

    def reduce(self, asked, how):
        assert how == "sum"
        return asked + asked.new_tensor(self.other)


@pytest.mark.parametrize(
    "own, other, cause",
    [
        (False, (0, 0), None),
        (True, (0, 0), "--time-limit 10m"),
        (False, (0, 1), "--time-limit 10m"),
        (False, (1, 0), "a signal to another process"),
        (True, (1, 0), "a signal to another process"),
    ],
)
def test_several_processes_stop_at_one_step(own, other, cause):
    """Their clocks differ, and the step at which the first one's time is over is that of all."""
    stop = StopRequest(Joined(*other), TimeLimit(600, "10m"))
    stop.time_is_over = own
    assert bool(stop) is (cause is not None)
    assert cause is None or stop.cause == cause


def main_with_slow_steps(arguments):
    step = Trainer.train_step

    def slow(*some, **named):
        time.sleep(0.05)
        return step(*some, **named)

    Trainer.train_step = slow
    main(arguments)


@pytest.mark.process
def test_a_process_ends_before_its_limit(little, tmp_path):
    """By the clock on the wall, from the start of the process on."""
    process = fork(command(little, tmp_path, "--epochs", "500", "--time-limit", "12s"), main_with_slow_steps)
    began = psutil.Process(process.pid).create_time()
    _, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE, error
    assert (latest(tmp_path / "run") / MANIFEST).stat().st_mtime - began < 12
    assert error.count("\n") == 1 and "stopped by --time-limit 12s after step" in error and "--resume auto" in error
    step = int(error.split("after step ")[1].split(";")[0])
    assert latest(tmp_path / "run").name == f"step-{step:08}" and damage(latest(tmp_path / "run")) is None


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_end_before_their_limit(little, tmp_path):
    flags = ["-b", "4", "--epochs", "500", "--time-limit", "25s"]
    ranks = fork_ranks(command(little, tmp_path, *flags), main=main_with_slow_steps)
    errors = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [EXIT_CODE, EXIT_CODE], errors
    assert "stopped by --time-limit 25s after step" in errors[0] and errors[1] == ""
    assert {file.name for file in latest(tmp_path / "run").iterdir()} >= {"process-0.pt", "process-1.pt"}


def test_preparing_is_broken_off(little, tmp_path, monkeypatch):
    """By an alarm: nobody looks at the clock while data are loaded."""
    monkeypatch.setattr(time_limit, "age", lambda: 0.0)
    monkeypatch.setattr("apart_hf.runs.prepare.load_image_data", lambda settings: time.sleep(60))
    began = time.monotonic()
    with pytest.raises(Interrupted, match=r"stopped by --time-limit 6s before a training step: .*more time is needed"):
        train(settings(little, tmp_path, time_limit="6s"))
    assert 0.5 < time.monotonic() - began < 20 and not (tmp_path / "run").exists()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_first_end_of_an_epoch_is_tried_and_broken_off(trained, little, tmp_path, clock, monkeypatch):
    """What it takes is not known, so a checkpoint is written before; the run then goes on from its evaluation."""
    evaluate = Trainer.evaluate

    def endless(self, *some):
        signal.raise_signal(signal.SIGALRM)  # the clock on the wall is another one here
        return evaluate(self, *some)

    limit = 4 + 9 + 2 + 14  # nine steps and a checkpoint; the end might take 5 + 1.5 (30 / 8 + 1 + 2) s
    config = settings(little, tmp_path, checkpoint_every=None, time_limit=f"{limit}s", resume="auto")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", endless)
        with pytest.raises(Interrupted, match=rf"stopped by --time-limit {limit}s between training steps"):
            train(config)
    assert latest(tmp_path / "run").name == "step-00000009" and damage(latest(tmp_path / "run")) is None
    assert clock.steps == 9
    clock.now = -1000.0
    train(settings(little, tmp_path, resume="auto"))
    assert clock.steps == 18
    assert_equal_runs(trained, tmp_path / "run")
