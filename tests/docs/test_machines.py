"""The two launchers' lines for two machines meet over loopback, and train to the same losses."""

import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.documents import blocks
from tests.support.helpers import ROOT

LAUNCHERS = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.launch"}
PORT = 29500 + os.getpid() % 1000  # of this test run
TINY = "-b 16 --groups 4 --epochs 1 --threads 1"


def lines():
    """The line of each launcher under "Two machines"."""
    page = (ROOT / "docs/guides/machines.md").read_text()
    (section,) = re.findall(r"^## Two machines\n(.*?)^## ", page, re.S | re.M)
    return {block.split()[0]: block.strip() for block in blocks(section, "bash")}


def on_loopback(line, data, output, machine):
    """The line for one CPU process on each of two machines, both of them this one."""
    replaced = {"HOST": "127.0.0.1", "FOLDER": str(data), "OUTPUT": str(output), "resnet18": "test_resnet"}
    replaced["29500"] = str(PORT)
    for name, value in replaced.items():
        line = re.sub(rf"\b{name}\b", value, line)
    for flag, value in (("--nproc-per-node", 1), ("--num_processes", 2), ("--machine_rank", machine)):
        line = re.sub(rf"{flag} \d+", f"{flag} {value}", line)
    launcher, *words = shlex.split(f"{line} {TINY}")
    words = words[1:] if launcher == "accelerate" else words  # launch
    return [sys.executable, "-m", LAUNCHERS[launcher], *words]


def test_the_lines_are_those_of_the_launchers(tmp_path):
    found = lines()
    assert list(found) == ["torchrun", "accelerate"]
    first, second = (on_loopback(found["accelerate"], tmp_path, tmp_path, machine) for machine in (0, 1))
    assert first != second and "127.0.0.1" in first and "--num_machines" in first


@pytest.mark.slow
@pytest.mark.process
def test_two_machines_meet_and_train_alike(little, tmp_path):
    losses = {}
    for name, line in lines().items():
        env = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

        def start(machine, line=line, name=name, env=env):
            command = on_loopback(line, little, tmp_path / name, machine)
            return subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, cwd=tmp_path)

        with ThreadPoolExecutor(2) as machines:
            first, second = machines.map(start, (0, 1))
        assert first.returncode == second.returncode == 0, first.stderr + second.stderr
        assert "2 process(es)" in first.stdout + second.stdout
        (metrics,) = (tmp_path / name).glob("*/metrics.jsonl")
        losses[name] = [json.loads(row)["train_loss"] for row in metrics.read_text().splitlines()]
    assert losses["torchrun"] == pytest.approx(losses["accelerate"], rel=1e-5) and len(losses["torchrun"]) == 1
