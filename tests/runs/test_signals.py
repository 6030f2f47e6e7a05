"""Signals to running trainings, by whoever sends them: users, schedulers, launchers."""

import os
import signal
import time

import pytest

from apart_hf.cli.train import main
from apart_hf.runs import prepare
from apart_hf.runs.checkpoints import damage
from apart_hf.runs.interruption import EXIT_CODE
from apart_hf.training.trainer import Trainer
from tests.support.processes import command, fork, latest, wait_for_checkpoint

pytestmark = pytest.mark.process


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_to_the_whole_group(name, little, tmp_path):
    """Launchers signal loader processes too."""
    more = ["--loader", "workers", "-j", "2", "--epochs", "40"]
    process = fork(command(little, tmp_path, *more), own_group=True)
    wait_for_checkpoint(process, tmp_path / "run")
    os.killpg(process.pid, getattr(signal, name))
    _, error = process.communicate(timeout=300)
    assert process.returncode == EXIT_CODE, error
    assert error.count("\n") == 1 and f"stopped by {name} after step" in error
    step = int(error.split("after step ")[1].split(";")[0])
    assert latest(tmp_path / "run").name == f"step-{step:08}" and damage(latest(tmp_path / "run")) is None


def main_that_loads_for_a_minute(arguments):
    def load_image_data(settings):
        print("loading", flush=True)
        time.sleep(60)

    prepare.load_image_data = load_image_data
    main(arguments)


def wait_for(line, process, seconds=100):
    """Until it has said so."""
    deadline = time.monotonic() + seconds
    while line not in process.said().splitlines():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_signal_before_training(name, little, tmp_path):
    process = fork(command(little, tmp_path), main_that_loads_for_a_minute, own_group=True)
    wait_for("loading", process)
    began = time.monotonic()
    process.send_signal(getattr(signal, name))
    _, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE and time.monotonic() - began < 30
    assert error.count("\n") == 1 and f"stopped by {name} between training steps" in error and "--resume auto" in error


def main_with_steps_of_a_minute(arguments):
    def train_step(self, images, targets, share=1.0):
        print("step", flush=True)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.05)

    Trainer.train_step = train_step
    main(arguments)


def test_a_second_signal_stops_at_once(little, tmp_path):
    process = fork(command(little, tmp_path), main_with_steps_of_a_minute, own_group=True)
    wait_for("step", process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None  # it finishes its step
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
