"""What can happen to a training: signals, kills, full disks, damaged files, a second run into its folder."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
from pathlib import Path

from apart_hf.runs.interruption import EXIT_CODE
from tests.support.processes import TRAIN, start, start_ranks

KINDS = {  # (flags, processes)
    "apart, from memory": ("--method apart --groups 3", 1),
    "standard, loader process": ("--method standard --loader workers -j 1 --reprob 0.5", 1),
    "random-bn, dropout, validation part": ("--method random-bn --groups 3 --drop 0.2 --val-fraction 0.2", 1),
    "apart, two processes": ("--method apart --groups 3 -b 6", 2),
    "sam, averaged weights": ("--method sam --model-ema --mixup 0.2", 1),
    "apart-sam, stream": ("--method apart-sam --groups 3 --streaming --shuffle-buffer 50", 1),
}
COMMON = (
    "--model test_resnet -b 12 --epochs 12 --lr 0.02 --checkpoint-every 5 --threads 1 --experiment run --resume auto"
)
PATIENCE = 300.0  # seconds; what takes longer counts as a hang
QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1"}


class Attempt:
    """The processes of one command."""

    def __init__(self, kind: str, data: str, output: Path):
        flags, count = KINDS[kind]
        self.kind, self.folder, self.began, self.resumed_after = kind, output / "run", time.monotonic(), None
        output.mkdir(parents=True, exist_ok=True)
        self.command = [*TRAIN, *COMMON.split(), "--data-dir", data, "--output", output, *flags.split()]
        self.logs = [output / f"{rank}.log" for rank in range(count)]
        files = [log.open("w") for log in self.logs]
        self.processes = (
            [start(self.command, files[0], own_group=True, **QUIET)]
            if count == 1
            else (start_ranks(self.command, count, files, own_group=True, **QUIET))
        )
        for file in files:
            file.close()

    @property
    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def says(self, text: str) -> bool:
        return text in self.logs[0].read_text()

    @property
    def done(self) -> bool:
        return all(process.poll() == 0 for process in self.processes)

    def until(self, condition, seconds: float) -> None:
        """Wait until it comes true, for at most so many seconds and while the run goes on."""
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end and not condition():
            if self.resumed_after is None and self.says("resumed from"):
                self.resumed_after = time.monotonic() - self.began
            time.sleep(0.005)

    def send(self, number: signal.Signals, processes=None, groups: bool = False) -> None:
        for process in processes or self.processes:
            if groups:
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    os.killpg(process.pid, number)
            else:
                process.send_signal(number)

    def exit_codes(self) -> list[int | str]:
        self.until(lambda: False, PATIENCE)
        if self.running:
            self.send(signal.SIGKILL)
            return ["hang"]
        return [process.wait() for process in self.processes]

    def limit_files(self, size: int) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def checkpoints(self, pattern: str = "step-*") -> list[Path]:
        return sorted((self.folder / "checkpoints").glob(pattern))


def sent(number: signal.Signals, groups: bool = False):
    def inject(attempt: Attempt, rng: random.Random):
        attempt.send(number, groups=groups)
        return {-number, EXIT_CODE}  # the first: before training has begun

    return inject


def twice(attempt: Attempt, rng: random.Random):
    for _ in range(2):
        attempt.send(signal.SIGTERM)
        time.sleep(rng.uniform(0, 0.2))
    return {-signal.SIGTERM, EXIT_CODE}


def killed_in_checkpoint(attempt: Attempt, rng: random.Random):
    left = attempt.checkpoints(".step-*")  # by an earlier kill
    attempt.until(lambda: set(attempt.checkpoints(".step-*")) - {*left}, 60)
    time.sleep(rng.uniform(0, 0.03))
    return sent(signal.SIGKILL)(attempt, rng)


def one_process_killed(attempt: Attempt, rng: random.Random):
    attempt.until(lambda: attempt.says("run: "), PATIENCE)  # before they have met, the other waits for a launcher
    attempt.send(signal.SIGKILL, [rng.choice(attempt.processes)])
    return {-signal.SIGKILL, EXIT_CODE}


def killed_and(harm):
    def inject(attempt: Attempt, rng: random.Random):
        allowed = sent(signal.SIGKILL)(attempt, rng)
        attempt.exit_codes()
        for newest in attempt.checkpoints()[-1:]:
            harm(newest, rng)
        return allowed

    return inject


def _flip(checkpoint: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(checkpoint.iterdir()))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1
    file.write_bytes(content)


def _cut(checkpoint: Path, rng: random.Random) -> None:
    manifest = checkpoint / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[: rng.randrange(400)])


def _delete(checkpoint: Path, rng: random.Random) -> None:
    rng.choice(sorted(checkpoint.iterdir())).unlink()


def full_disk(attempt: Attempt, rng: random.Random):
    """No file may grow beyond 100 KB, for a while."""
    attempt.limit_files(100_000)
    attempt.until(lambda: attempt.says("warning: no checkpoint"), 20)
    attempt.limit_files(resource.RLIM_INFINITY)
    return {2, EXIT_CODE}  # where it was the weights of an epoch that had no room


def second_run(attempt: Attempt, rng: random.Random):
    attempt.until(lambda: attempt.says("run: "), PATIENCE)
    other = start(attempt.command, **QUIET)
    _, error = other.communicate(timeout=PATIENCE)
    assert not attempt.running or (other.returncode == 2 and "is in use by another run" in error), error
    return set()


FAULTS = {
    "SIGKILL": sent(signal.SIGKILL),
    "SIGTERM": sent(signal.SIGTERM),
    "SIGINT": sent(signal.SIGINT),
    "SIGUSR1": sent(signal.SIGUSR1),
    "SIGTERM to the process group": sent(signal.SIGTERM, groups=True),
    "SIGINT to the process group": sent(signal.SIGINT, groups=True),
    "SIGTERM twice": twice,
    "SIGKILL while a checkpoint is written": killed_in_checkpoint,
    "SIGKILL, then a flipped bit in the newest checkpoint": killed_and(_flip),
    "SIGKILL, then its manifest cut": killed_and(_cut),
    "SIGKILL, then one of its files deleted": killed_and(_delete),
    "no room for a checkpoint": full_disk,
    "a second run into the folder": second_run,
    "SIGKILL of one process of two": one_process_killed,
}


NEED_TWO, SURVIVED = {"SIGKILL of one process of two"}, {"no room for a checkpoint", "a second run into the folder"}
