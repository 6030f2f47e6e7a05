"""Training under random kills and faults, compared bit for bit with training in peace.

    python -m tests.soak --minutes 30 --report docs/SOAK.md

Each run is cut off again and again, always goes on by `--resume auto`, and at its end must have the metrics and the
weights of a run of the same settings that nothing happened to. Exits with 1 where one has not.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from apart_hf.utils.environment import git_commit
from tests.support.faults import FAULTS, KINDS, NEED_TWO, PATIENCE, SURVIVED, Attempt
from tests.support.helpers import write_demo
from tests.support.processes import assert_equal_runs

FAULTS_A_RUN = 6


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
        "| what | value |",
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
