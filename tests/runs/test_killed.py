"""Real processes that are killed or stopped by a signal go on exactly, and two of them do not share a folder."""

import random
import signal
import time

import pytest

from apart_hf.config.arguments import parse_arguments
from apart_hf.runs.interruption import EXIT_CODE
from apart_hf.runs.train import train
from tests.support.processes import TRAIN, assert_equal_runs, command, fork, start, wait_for_checkpoint

pytestmark = pytest.mark.process


def live(little, output, rng, *, kill, writing):
    """One process, to its end or killed: in the midst of writing a checkpoint, or of what comes after one."""

    def found(pattern):
        return set((output / "run/checkpoints").glob(pattern))

    def wait(condition):
        while process.poll() is None and not condition():
            time.sleep(0.001)

    before, left = found("step-*"), found(".step-*")
    process = fork(command(little, output))
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
    process = start(command(little, tmp_path))  # an interpreter of its own, as users start it
    wait_for_checkpoint(process, tmp_path / "run")
    process.send_signal(getattr(signal, name))
    _, error = process.communicate(timeout=300)
    assert process.returncode == EXIT_CODE == 75
    assert error.count("\n") == 1 and f"stopped by {name} after step" in error and "--resume auto" in error
    step = int(error.split("after step ")[1].split(";")[0])
    assert (tmp_path / f"run/checkpoints/step-{step:08}").exists()
    second = fork(command(little, tmp_path))
    assert second.wait(timeout=300) == 0, second.communicate()
    assert_equal_runs(whole, tmp_path / "run")


def test_two_runs_into_one_folder(little, tmp_path):
    """That a lock of the dead is none is seen wherever a killed run goes on."""
    first = fork(command(little, tmp_path, "--epochs", "500"))
    try:
        wait_for_checkpoint(first, tmp_path / "run")
        second = fork(command(little, tmp_path, "--epochs", "500"))
        _, error = second.communicate(timeout=300)
        assert second.returncode == 2 and "is in use by another run (process " in error and error.count("\n") == 1
    finally:
        first.kill()
        first.communicate()
