"""What all commands share: a parser whose errors are one line, and how a command ends."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn, TextIO

from apart_hf.errors import ApartError, OneProcessError, one_line
from apart_hf.utils.processes import rank
from apart_hf.utils.said_once import is_first_to_say

_program: ContextVar[str | None] = ContextVar("program", default=None)  # that runs, as its user knows it


class Parser(argparse.ArgumentParser):
    """Parses a command line; bad input ends in one line and exit code 2.

    Args:
        prog: the name of the program; None: of the command that runs.
        **options: of `argparse.ArgumentParser`.
    """

    def __init__(self, prog: str | None = None, **options: Any):
        super().__init__(prog=prog or _program.get(), **options)

    def error(self, message: str) -> NoReturn:
        text = f"{self.prog}: error: {' '.join(message.split())} (--help lists the options)\n"
        self.exit(2, text if is_first_to_say(text) else None)


def at_least(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Make a type for argparse: whole numbers from `least` to `most`."""

    def integer(text: str) -> int:
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text}: must be from {least} to {most}")
        return int(text)

    return integer


def run_command(command: Callable[[str], object], *, prog: str | None = None) -> None:
    """Run `command(prog)`; an ApartError ends in one line on stderr and exit code 2.

    Of several processes that meet it, one says it.

    Args:
        command: it is given the name of the program.
        prog: that name; None: of the script.
    """
    prog = prog or Path(sys.argv[0]).name
    token = _program.set(prog)
    try:
        with forgiving_output(), logging_to_output():
            command(prog)
    except ApartError as error:
        text = one_line(error)
        if isinstance(error, OneProcessError) or is_first_to_say(text):
            process = f"process {rank()}: " if rank() else ""
            print(f"{prog}: error: {process}{text}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        _program.reset(token)


class _Forgiving:
    """Writes to a stream until its first failure, which one line on stderr tells; then it writes nowhere."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        with contextlib.suppress(OSError):  # it may be the same file
            print(
                f"warning: standard output cannot be written ({error.strerror}); no more is said there.",
                file=sys.stderr,
                flush=True,
            )
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # so that what is still buffered cannot fail either
        os.close(nowhere)


@contextlib.contextmanager
def forgiving_output() -> Iterator[None]:
    """Let a failing standard output be no error within the block."""
    before, sys.stdout = sys.stdout, _Forgiving(sys.stdout)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout = before


class _Output(logging.StreamHandler):
    """Writes to whatever standard output is at that moment."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout


@contextlib.contextmanager
def logging_to_output() -> Iterator[None]:
    """Write what this package logs to standard output within the block, by the first process of a run alone."""
    logger, handler = logging.getLogger("apart_hf"), _Output()
    handler.addFilter(lambda record: rank() == 0)
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates
