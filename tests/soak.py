"""Training under random kills and faults, compared bit for bit with training in peace.

    python -m tests.soak --minutes 30 --report docs/SOAK.md

Each run is cut off again and again, always goes on by `--resume auto`, and at its end must have the metrics and the
weights of a run of the same settings that nothing happened to. Exits with 1 where one has not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from apart_hf.runs.interruption import EXIT_CODE
from apart_hf.utils.environment import git_commit
from tests.support.helpers import write_demo
from tests.support.processes import TRAIN, assert_equal_runs, start, start_ranks

KINDS = {  # (flags, processes)
    "apart, from memory": (["--method", "apart", "--groups", "3"], 1),
    "standard, loader process": (["--method", "standard", "--loader", "workers", "-j", "1", "--reprob", "0.5"], 1),
    "random-bn, dropout, validation part": (
        ["--method", "random-bn", "--groups", "3", "--drop", "0.2", "--val-fraction", "0.2"],
        1,
    ),
    "apart, two processes": (["--method", "apart", "--groups", "3", "-b", "6"], 2),
    "sam, averaged weights": (["--method", "sam", "--model-ema", "--mixup", "0.2"], 1),
    "apart-sam, stream": (["--method", "apart-sam", "--groups", "3", "--streaming", "--shuffle-buffer", "50"], 1),
}
COMMON = [
    "--model",
    "test_resnet",
    "-b",
    "12",
    "--epochs",
    "12",
    "--lr",
    "0.02",
    "--checkpoint-every",
    "5",
    "--threads",
    "1",
    "--experiment",
    "run",
    "--resume",
    "auto",
]
PATIENCE = 300.0  # seconds; what takes longer counts as a hang
FAULTS_A_RUN = 6
QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1"}


class Attempt:
    """The processes of one command."""

    def __init__(self, kind: str, data: str, output: Path):
        flags, count = KINDS[kind]
        self.kind, self.folder, self.began, self.resumed_after = kind, output / "run", time.monotonic(), None
        output.mkdir(parents=True, exist_ok=True)
        self.command = [*TRAIN, *COMMON, "--data-dir", data, "--output", output, *flags]
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


# Each fault is something done to an attempt; it returns the exit codes that it may lead to, beside 0.


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


@dataclass
class Tally:
    injected: Counter = field(default_factory=Counter)
    exits: Counter = field(default_factory=Counter)  # by (fault, exit code)
    finished: Counter = field(default_factory=Counter)  # by kind of run
    passed_over: int = 0
    resumed_after: list[float] = field(default_factory=list)  # seconds from a command to its line that it goes on
    wrong: list[str] = field(default_factory=list)


def draw(deck: list[str], rng: random.Random, processes: int) -> str:
    """Each fault once before any comes again."""
    fits = [fault for fault in deck if processes > 1 or fault not in NEED_TWO]
    if not fits:
        deck += rng.sample([*FAULTS], len(FAULTS))
        return draw(deck, rng, processes)
    deck.remove(fits[0])
    return fits[0]


def harass(attempt: Attempt, faults: int, deck: list[str], rng: random.Random, tally: Tally) -> int:
    """One command under at most so many faults, to its end. Returns how many there were."""
    came, allowed, codes = [], {0}, None
    if rng.random() < 0.8:  # else also while it starts
        attempt.until(lambda: attempt.says("run: "), PATIENCE)
    while len(came) < faults and (not came or came[-1] in SURVIVED):
        attempt.until(lambda: False, rng.uniform(0, 6))
        if not attempt.running:
            break
        came.append(draw(deck, rng, len(attempt.processes)))
        allowed |= FAULTS[came[-1]](attempt, rng)
    codes, last = attempt.exit_codes(), came[-1] if came else "nothing"
    tally.injected.update(came)
    tally.exits.update((last, code) for code in codes)
    tally.passed_over += attempt.logs[0].read_text().count("is passed over")
    if attempt.resumed_after is not None:
        tally.resumed_after.append(attempt.resumed_after)
    if not set(codes) <= allowed:
        said = [log.read_text().strip().splitlines()[-1:] for log in attempt.logs]
        tally.wrong.append(f"{attempt.kind}, {last}: exit codes {codes}, of {allowed}: {said}")
    return len(came)


def live(
    kind: str, data: str, output: Path, whole: Path, end: float, deck: list[str], rng: random.Random, tally: Tally
) -> None:
    """One run under faults, until `end`, by as many commands as it takes."""
    left, attempt = FAULTS_A_RUN, None
    while attempt is None or not attempt.done:
        attempt = Attempt(kind, data, output)
        left -= harass(attempt, left if time.monotonic() < end else 0, deck, rng, tally)
        if len(tally.wrong) > 20:
            return
    try:
        assert_equal_runs(whole, attempt.folder)
        tally.finished[kind] += 1
    except (AssertionError, OSError) as error:
        tally.wrong.append(f"{kind}: the end differs: {str(error)[:200]}")
    shutil.rmtree(output)


def soak(minutes: float, seed: int, scratch: Path) -> Tally:
    rng, tally, deck, whole = random.Random(seed), Tally(), [], {}
    data, end, kinds = write_demo(scratch / "data", train=240, test=100), time.monotonic() + 60 * minutes, [*KINDS]
    number = 0
    while time.monotonic() < end:
        kind = kinds[number % len(kinds)]
        if kind not in whole:
            peace = Attempt(kind, data, scratch / f"whole{number}")
            assert peace.exit_codes() == [0] * len(peace.processes), peace.logs[0].read_text()
            whole[kind] = peace.folder
        live(kind, data, scratch / f"run{number}", whole[kind], end, deck, rng, tally)
        number += 1
        print(f"{number} runs, {tally.injected.total()} faults, wrong: {tally.wrong}", flush=True)
    return tally


def report(tally: Tally, minutes: float, seed: int) -> str:
    lines = [
        "# Soak",
        "",
        "`python -m tests.soak` trains on 240 images of the demo data while faults are injected at "
        "random moments, goes on by `--resume auto`, and compares each run at its end, bit for bit, with one that "
        "nothing happened to.",
        "",
        "| | |",
        "|---|---|",
        f"| asked for | {minutes:g} minutes, seed {seed}, commit {git_commit()} |",
        f"| runs finished and equal | {tally.finished.total()} |",
        f"| faults | {tally.injected.total()} |",
        f"| commands that went on from a checkpoint | {len(tally.resumed_after)} |",
        f"| checkpoints passed over as damaged | {tally.passed_over} |",
        f"| longest time from a command to its going on | {max(tally.resumed_after, default=0):.1f} s |",
        f"| mismatches and unexpected exits | {len(tally.wrong)} |",
        "",
        "| run | finished and equal |",
        "|---|---|",
        *(f"| {kind} | {tally.finished[kind]} |" for kind in KINDS),
        "",
        "| fault | times | exit codes of the processes, and how often |",
        "|---|---|---|",
    ]
    for fault in FAULTS:
        codes = sorted((str(code), count) for (one, code), count in tally.exits.items() if one == fault)
        lines.append(f"| {fault} | {tally.injected[fault]} | {', '.join(f'{c}: {n}' for c, n in codes)} |")
    return "\n".join([*lines, "", *(f"- {line}" for line in tally.wrong)]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    with tempfile.TemporaryDirectory() as scratch:
        tally = soak(options.minutes, options.seed, Path(scratch))
    text = report(tally, options.minutes, options.seed)
    print(text)
    if options.report is not None:
        options.report.write_text(text)
    sys.exit(bool(tally.wrong))


if __name__ == "__main__":
    main()
