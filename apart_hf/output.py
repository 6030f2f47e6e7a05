"""Standard output that may fail, for instance on a full disk, without ending what writes there."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Forgiving:
    """A stream that goes nowhere from its first failure on, after one line on stderr."""

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
            print(f"warning: standard output cannot be written ({error.strerror}); no more is said there.",
                  file=sys.stderr, flush=True)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # so that what is still buffered cannot fail either
        os.close(nowhere)


@contextlib.contextmanager
def forgiving_output() -> Iterator[None]:
    """Within, a failing standard output is no error."""
    before, sys.stdout = sys.stdout, _Forgiving(sys.stdout)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout = before
