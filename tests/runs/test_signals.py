"""Signals to running trainings, by whoever sends them: users, schedulers, launchers."""

import os
import signal
import sys
import time

import pytest

from apart_hf.runs.checkpoints import damage
from apart_hf.runs.interruption import EXIT_CODE
from tests.support.processes import TRAIN, command, latest, start, wait_for_checkpoint


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_to_the_whole_group(name, little, tmp_path):
    """Launchers signal loader processes too."""
    more = ["--loader", "workers", "-j", "2", "--epochs", "40"]
    process = start(command(little, tmp_path, *more), own_group=True)
    wait_for_checkpoint(process, tmp_path / "run")
    os.killpg(process.pid, getattr(signal, name))
    _, error = process.communicate(timeout=300)
    assert process.returncode == EXIT_CODE, error
    assert error.count("\n") == 1 and f"stopped by {name} after step" in error
    step = int(error.split("after step ")[1].split(";")[0])
    assert latest(tmp_path / "run").name == f"step-{step:08}" and damage(latest(tmp_path / "run")) is None


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_signal_before_training(name, little, tmp_path):
    code = (
        "import sys, time, apart_hf.train as t\n"
        "def slowly(settings):\n"
        "    print('loading', flush=True)\n"
        "    time.sleep(60)\n"
        "t.load_image_data = slowly\n"
        "t.main(sys.argv[1:])\n"
    )
    process = start([sys.executable, "-c", code, *command(little, tmp_path)[len(TRAIN) :]], own_group=True)
    assert process.stdout.readline() == "loading\n"
    began = time.monotonic()
    process.send_signal(getattr(signal, name))
    _, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE and time.monotonic() - began < 30
    assert error.count("\n") == 1 and f"stopped by {name} between training steps" in error and "--resume auto" in error


def test_a_second_signal_stops_at_once(little, tmp_path):
    code = (
        "import sys, time, apart_hf.training.trainer as t, torch\n"
        "def slow(self, images, targets, share=1.0):\n"
        "    print('step', flush=True)\n"
        "    end = time.monotonic() + 60\n"
        "    while time.monotonic() < end: time.sleep(0.05)\n"
        "t.Trainer.train_step = slow\n"
        "from apart_hf.cli.train import main\n"
        "main(sys.argv[1:])\n"
    )
    process = start([sys.executable, "-c", code, *command(little, tmp_path)[len(TRAIN) :]], own_group=True)
    while process.stdout.readline() != "step\n":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None  # it finishes its step
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
    process.communicate()
