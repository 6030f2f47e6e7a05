"""Runs of two processes: one dies or hangs, both are stopped, both go on."""

import datetime
import json
import signal
import sys
import time

import pytest
import torch.distributed as dist

from apart_hf.cli.train import main
from apart_hf.runs.checkpoints import damage
from apart_hf.runs.interruption import EXIT_CODE
from tests.support.processes import assert_equal_runs, command, fork_ranks, latest, start, wait_for_checkpoint

SECONDS = 30  # within which the others end; seen: 2 to 4

pytestmark = pytest.mark.process


def ended(processes, seconds=300):
    """(exit codes, what each wrote to stderr)."""
    try:
        errors = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def lose(victim, ranks, folder):
    """SIGKILL of one; what the other one does is checked."""
    wait_for_checkpoint(ranks[0], folder, after=latest(folder))
    ranks[victim].kill()
    began = time.monotonic()
    codes, errors = ended(ranks, SECONDS)
    assert time.monotonic() - began < SECONDS
    other = 1 - victim
    assert (codes[victim], codes[other]) == (-signal.SIGKILL, EXIT_CODE), errors
    said = errors[other]
    assert said.count("\n") == 1 and "another process of this run has ended or does not answer" in said, said
    assert said.startswith("process 1: ") == (other == 1) and "--resume auto" in said
    assert damage(latest(folder)) is None


def test_one_process_dies(little, tmp_path):
    lose(1, fork_ranks(command(little, tmp_path, "-b", "4")), tmp_path / "run")


KINDS = {
    "apart, memory": ["--method", "apart"],
    "apart, workers": ["--method", "apart", "--loader", "workers", "-j", "1"],
    "apart, means of statistics": ["--method", "apart", "--dist-bn", "reduce", "--model-ema", "--aug-repeats", "2"],
    "apart-sam, averaged": ["--method", "apart-sam", "--model-ema", "--grad-accum-steps", "2", "--mixup", "0.2"],
    "advprop": ["--method", "advprop", "--steps", "1", "--aux-affine", "--random-start"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_go_on_exactly(kind, little, tmp_path):
    """After each of them was killed, and after both were stopped by a signal to one."""

    def run(name):
        return fork_ranks(command(little, tmp_path / name, "-b", "4", *KINDS[kind]))

    codes, errors = ended(run("whole"))
    assert codes == [0, 0], errors
    folder = tmp_path / "part/run"
    for victim in range(2):
        lose(victim, run("part"), folder)
    ranks = run("part")
    wait_for_checkpoint(ranks[0], folder, after=latest(folder))
    ranks[1].send_signal(signal.SIGTERM)
    codes, errors = ended(ranks)
    assert codes == [EXIT_CODE, EXIT_CODE], errors
    assert "stopped by a signal to another process after step" in errors[0] and errors[1] == ""
    step = int(errors[0].split("after step ")[1].split(";")[0])
    assert latest(folder).name == f"step-{step:08}"  # both stopped there: what each of them keeps is in it
    assert {file.name for file in latest(folder).iterdir()} >= {"process-0.pt", "process-1.pt"}
    codes, errors = ended(run("part"))
    assert codes == [0, 0], errors
    assert_equal_runs(tmp_path / "whole/run", folder)


@pytest.mark.slow
@pytest.mark.parametrize("before, now", [(1, 2), (2, 1)])
def test_another_number_of_processes_is_refused(before, now, little, tmp_path):
    codes, errors = ended(fork_ranks(command(little, tmp_path, "-b", "4", "--max-steps", "6"), before))
    assert codes == [0] * before, errors
    was = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file() and file.name != ".lock"}
    codes, errors = ended(fork_ranks(command(little, tmp_path, "-b", "4", "--max-steps", "9", "--override"), now))
    assert codes == [2] * now and f"is of {before} process(es), and {now} were started" in errors[0]
    assert [error.count("\n") for error in errors] == [1, 0][:now]
    del was[tmp_path / "run/config.yaml"]  # rewritten
    assert all(file.read_bytes() == content for file, content in was.items())


def impatient_main(arguments):
    begin = dist.init_process_group
    dist.init_process_group = lambda *a, **k: begin(*a, **k | {"timeout": datetime.timedelta(seconds=5)})
    main(arguments)


@pytest.mark.slow
def test_a_process_that_hangs(little, tmp_path):
    """After the time that torch gives an exchange, here 5 seconds, usually 30 minutes."""
    ranks = fork_ranks(command(little, tmp_path, "-b", "4"), main=impatient_main)
    wait_for_checkpoint(ranks[0], tmp_path / "run")
    ranks[1].send_signal(signal.SIGSTOP)
    try:
        _, error = ranks[0].communicate(timeout=SECONDS + 5)
    finally:
        ranks[1].kill()
    assert ranks[0].returncode == EXIT_CODE and error.count("\n") == 1 and "Timed out waiting" in error
    ranks[1].communicate()


@pytest.mark.slow
def test_under_torchrun(little, tmp_path):
    """The launcher hands SIGTERM on to all, and they stop at the same checkpoint, from which they go on."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = command(little, tmp_path, "-b", "4")[1:]
    process = start([*launcher, *flags], ACCELERATE_USE_CPU="true")
    wait_for_checkpoint(process, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    assert "stopped by SIGTERM after step" in error, error
    assert damage(latest(tmp_path / "run")) is None
    process = start([*launcher, *flags], ACCELERATE_USE_CPU="true")
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0 and "resumed from" in out, error
    assert [json.loads(line)["epoch"] for line in (tmp_path / "run/metrics.jsonl").open()] == list(range(1, 9))
