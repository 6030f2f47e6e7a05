"""Keeps the marker `process` honest: a test without it fails where it starts Python."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from multiprocessing import popen_forkserver, popen_spawn_posix
from pathlib import Path
from unittest import mock

import pytest

LAUNCHERS = ("python", "pytest", "accelerate", "torchrun")


def _refuse(what: str) -> None:
    # beyond the reach of an `except Exception`
    pytest.fail(f"this test starts {what}: mark it with pytest.mark.process, or make it do without")


def _starts_python(command) -> bool:
    first = command.split()[0] if isinstance(command, str) else str(next(iter(command)))
    return Path(first).name.startswith(LAUNCHERS)


@contextlib.contextmanager
def python_is_started_by_marked_tests(item: pytest.Item) -> Iterator[None]:
    """Within, the test may start an interpreter, or have a process forked by the server, only if it says so.

    Loader processes, which are forks of this one, are free.
    """
    if item.get_closest_marker("process"):
        yield
        return
    begin = subprocess.Popen.__init__

    def popen(self, args, *more, **named):
        if _starts_python(args):
            _refuse(str(args))
        begin(self, args, *more, **named)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(subprocess.Popen, "__init__", popen))
        for method in (popen_forkserver, popen_spawn_posix):
            patches.enter_context(mock.patch.object(method.Popen, "_launch", lambda *_: _refuse("a process of Python")))
        yield
