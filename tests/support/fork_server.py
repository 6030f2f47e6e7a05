"""Processes forked from a server that has imported the libraries: real processes, without their seconds of imports."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.multiprocessing as mp

# pytest is imported by the test that a function belongs to, the last two by a run's plot
PRELOAD = [
    "tests.support.helpers",
    "apart_hf.runs.train",
    "pytest",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
]


def fork_server():
    """The multiprocessing context of the one server of this pytest process."""
    mp.set_forkserver_preload(PRELOAD)  # heeded until the server runs
    return mp.get_context("forkserver")


def no_wait_for_the_disk(descriptor: int) -> None:
    """Takes the place of `os.fsync`, which guards against what no test does: to cut the power."""


def _become(call: Callable, arguments: Sequence, logs: Sequence[str], own_group: bool, env: dict[str, str]) -> None:
    if own_group:
        os.setsid()
    os.chdir("/")
    os.environ.update(env)
    os.fsync = no_wait_for_the_disk
    mp.set_start_method(None, force=True)  # its own children, loader processes, are started as usual, not by a server
    for stream, log in zip((1, 2), logs):
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, stream)
        os.close(file)
    call(*arguments)


_started: list[Forked] = []


def end_all() -> None:
    """Kill those that a test has left."""
    while _started:
        process = _started.pop()
        process.kill()
        process.wait()


class Forked:
    """A call in a process of its own, with the parts of `subprocess.Popen` that tests use.

    Signals, exit codes, memory, locks and groups are those of any process; only the interpreter's start and the imports
    have been done once for all, and how it ends (the last flush, atexit) is multiprocessing's.
    """

    def __init__(self, call: Callable, arguments: Sequence = (), own_group: bool = False, **env: str):
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self._logs = [f"{self._folder.name}/{name}" for name in ("out", "err")]
        self._process = fork_server().Process(target=_become, args=(call, arguments, self._logs, own_group, env))
        self._process.start()
        _started.append(self)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self.returncode

    def said(self) -> str:
        """What it has written to standard output until now."""
        return Path(self._logs[0]).read_text() if os.path.exists(self._logs[0]) else ""

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return tuple(Path(log).read_text() if os.path.exists(log) else "" for log in self._logs)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
