"""Runs that lack memory or lose a loader process, and what a long run takes of both."""

import contextlib
import resource
import time

import psutil
import pytest

from apart_hf.cli.train import main
from apart_hf.errors import OneProcessError
from apart_hf.runs import interruption
from apart_hf.runs.checkpoints import damage
from apart_hf.runs.interruption import EXIT_CODE
from apart_hf.runs.train import train
from apart_hf.training.trainer import Trainer
from tests.support.fork_server import Forked
from tests.support.helpers import write_demo
from tests.support.processes import command, fork, latest, wait_for_checkpoint
from tests.support.settings import settings

MB = 2**20


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("data") / "little", train=360, test=60)


def arguments(little, output, *flags):
    """Of a run."""
    own = "--model test_resnet --method standard -b 8 --epochs 2 --threads 1 --experiment run"
    return [*own.split(), "--data-dir", little, "--output", str(output), *map(str, flags)]


def main_with_little_memory(arguments):
    """With 500 MB beyond what libraries, their threads and the data take as training begins.

    In a new process: memory that other tests have used and given back would not count.
    """
    begin = Trainer.fit

    def fit(self, *given, **named):
        most = psutil.Process().memory_info().vms + 500 * MB
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        return begin(self, *given, **named)

    Trainer.fit = fit
    main(arguments)


def test_images_too_large_for_any_memory(little, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments(little, tmp_path, "--img-size", 200_000))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "out of memory at --batch-size 8 images of 200000 pixels" in error
    assert "try --batch-size 4 --grad-accum-steps 2, --amp, --grad-checkpointing" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.process
@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_out_of_memory(where, little, tmp_path):
    sizes = {"training": (64, 8), "evaluation": (2, 60)}[where]
    flags = f"-b {sizes[0]} --validation-batch-size {sizes[1]} --checkpoint-every 2 --img-size 512 --max-steps 2"
    flags = [*flags.split(), "--loader", "workers", "--workers", "0"]
    failed = Forked(main_with_little_memory, (arguments(little, tmp_path, *flags),))
    _, error = failed.communicate(timeout=300)
    assert failed.returncode == 2 and error.count("\n") == 1, error
    assert f"out of memory at --batch-size {sizes[0]} images of 512 pixels (" in error
    assert f"--batch-size {sizes[0] // 2} --grad-accum-steps 2" in error
    assert f"--validation-batch-size below {sizes[1]}" in error and error.count("out of memory at") == 1
    if where == "training":
        assert "There is no checkpoint yet." in error and not list(tmp_path.iterdir())
    else:
        kept = tmp_path / "run/checkpoints/step-00000002"
        assert f"The last good checkpoint is {kept}" in error and "--resume auto" in error and damage(kept) is None


def loader_process(process, folder):
    """The first one of a run, when there is one."""
    own, deadline = psutil.Process(process.pid), time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        if (folder / "config.yaml").exists():  # no other child is started after that
            with contextlib.suppress(psutil.NoSuchProcess):
                found = [child for child in own.children() if child.cmdline() == own.cmdline()]
                if found:
                    return found[0]
        time.sleep(0.01)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.process
@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_loader_process_is_killed(checkpointed, little, tmp_path):
    folder = tmp_path / "run"
    flags = f"--loader workers --workers 1 --epochs 500 --checkpoint-every {2 if checkpointed else 100_000}"
    process = fork(command(little, tmp_path, *flags.split()))
    loader = loader_process(process, folder)
    if checkpointed:
        wait_for_checkpoint(process, folder)
    loader.kill()
    _, error = process.communicate(timeout=100)
    # the thread of multiprocessing that feeds the lost process may have its own say while Python shuts down
    assert "is gone after step" in error, (process.returncode, error)
    (said,) = [line for line in error.splitlines() if f"loader process {loader.pid} is gone after step " in line]
    assert "fewer than --workers 1, or --loader memory" in said
    if checkpointed:
        assert process.returncode == EXIT_CODE and "To go on: the same command with --resume auto" in said
        assert damage(latest(folder)) is None
    else:
        assert process.returncode == 2 and "There is no checkpoint yet." in said and not folder.exists()


def test_the_pipe_of_a_killed_loader_process_ends_first(little, tmp_path, monkeypatch):
    """The run meets the end of the pipe before torch's watch over loader processes has heard of it."""
    killed = []

    def fit(trainer, epochs, max_steps):
        batches = iter(trainer.train_loader)
        next(batches)
        (loader,) = (one for one in psutil.Process().children(recursive=True) if one.name().startswith("pt_data"))
        killed.append(loader.pid)
        loader.kill()
        raise EOFError
        yield

    monkeypatch.setattr(Trainer, "fit", fit)
    with pytest.raises(OneProcessError, match=r"loader process (\d+) is gone after step 0.* no checkpoint") as raised:
        train(settings(little, tmp_path, loader="workers", workers=1))
    assert str(raised.value).split()[2] == str(killed[0]) and not (tmp_path / "run").exists()


CASES = {
    "standard": ({}, 2000),
    "apart-sam": ({"groups": 2}, 2000),
    "standard, workers": ({"loader": "workers", "workers": 2}, 600),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_long_run_takes_no_more(case, little, tmp_path, monkeypatch):
    """At most 16 MB and no open file more after all steps than after 200; every 45 steps are an epoch with its
    evaluation, export and checkpoint."""
    more, steps = CASES[case]
    taken, after_step = {}, interruption.Schedule.__call__

    def measured(schedule):
        after_step(schedule)
        if schedule.progress.steps % 45 == 20:
            own = psutil.Process()
            taken[schedule.progress.steps] = own.memory_info().rss / MB, own.num_fds()

    monkeypatch.setattr(interruption.Schedule, "__call__", measured)
    train(
        settings(
            little,
            tmp_path,
            method=case.split(",")[0],
            epochs=steps // 45 + 1,
            checkpoint_every=None,
            checkpoint_hist=2,
            threads=1,
            **more,
        )
    )
    early, late = taken[200], taken[max(taken)]
    print(
        f"\n{case}: step 200: {early[0]:.1f} MB, {early[1]} files; step {max(taken)}: {late[0]:.1f} MB, "
        f"{late[1]} files; largest {max(rss for rss, _ in taken.values()):.1f} MB"
    )
    assert max(taken) >= steps - 45
    assert late[0] - early[0] <= 16 and late[1] <= early[1]
