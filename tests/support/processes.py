"""Training runs as processes of their own: started, cut off, compared."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import safetensors.torch

from apart_hf.cli.train import main
from tests.support.fork_server import Forked
from tests.support.helpers import ROOT, assert_same

TIMING = ("seconds", "images_per_second")
TRAIN = [sys.executable, str(ROOT / "scripts/train.py")]


def command(data, output, *more):
    """A run of 72 steps on 72 images that writes a checkpoint at every third and goes on by itself."""
    flags = "--model test_resnet -b 8 --epochs 8 --lr 0.02 --threads 1 --checkpoint-every 3 --resume auto"
    groups = [] if "advprop" in more else ["--groups", "2"]
    return [*TRAIN, *flags.split(), *groups, "--data-dir", data, "--output", str(output), "--experiment", "run", *more]


def start(command, log=subprocess.PIPE, own_group=False, **env):
    """A command by an interpreter of its own. Its stdout and stderr go to `log`: pipes, or one file."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd="/",
        stdout=log,
        stderr=log,
        text=True,
        start_new_session=own_group,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env,
    )


def fork(command, main=main, own_group=False, **env):
    """A training command in a process forked from the server; `main` takes the flags in the place of the command's."""
    assert command[: len(TRAIN)] == TRAIN
    flags = [str(part) for part in command[len(TRAIN) :]]
    return Forked(main, (flags,), own_group, OMP_NUM_THREADS="1", **env)


def ranks_environment(count):
    """Of each process of one run, as a launcher sets it; but nobody ends the others where one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["ACCELERATE_USE_CPU"] = "true"
    return [
        {key: str(value) for key, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        for rank in range(count)
    ]


def start_ranks(command, count=2, logs=(subprocess.PIPE, subprocess.PIPE), own_group=False, **env):
    """The processes of one run, by interpreters of their own."""
    return [start(command, log, own_group, **env, **own) for own, log in zip(ranks_environment(count), logs)]


def fork_ranks(command, count=2, main=main):
    """The processes of one run, forked from the server."""
    return [fork(command, main, **own) for own in ranks_environment(count)]


def latest(folder):
    """The newest checkpoint's folder; None: there is none."""
    return max((folder / "checkpoints").glob("step-*"), default=None)


def wait_for_checkpoint(process, folder, after=None, seconds=250):
    """Until there is one, or another one than `after`."""
    deadline = time.monotonic() + seconds
    while latest(folder) == after:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.01)


def result(folder):
    """(metrics but for their times, tensors of last/ and best/)."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    plain = [{key: value for key, value in line.items() if key not in TIMING} for line in lines]
    states = {name: safetensors.torch.load_file(Path(folder) / name / "model.safetensors") for name in ("last", "best")}
    return plain, states


def assert_equal_runs(one, two):
    """Metrics, weights, and the results of the test split where there are any."""
    tests = [file.read_text() if (file := Path(folder) / "test.json").exists() else None for folder in (one, two)]
    assert tests[0] == tests[1]
    (lines, states), (others, other_states) = result(one), result(two)
    assert lines == others
    for name, state in states.items():
        assert_same(other_states[name], state, tolerance=0)
