"""The one exception that means "the caller can fix this"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ApartError(ValueError):
    """Bad input: the message is one line that says what is wrong, with the numbers, and the cure.

    Scripts print it and exit with code 2; every other exception is a fault of the program and keeps its traceback.
    """


class OneProcessError(ApartError):
    """Bad input that only one process of a run may have met, so it is that one that tells."""


def one_line(error: ApartError) -> str:
    """Its message; that of an error in a loader process comes with a traceback, of which it is the last line."""
    last = str(error).strip().splitlines()[-1]
    return last.removeprefix(f"{ApartError.__module__}.{type(error).__name__}: ")


def first_line(error: BaseException) -> str:
    """Of its message, or its name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def unknown_name(kind: str, name: str, known: Iterable[str], more: str = "") -> ApartError:
    """An error for a misspelt name: it names the closest of `known`, or lists them where they are few; then `more`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        cure = f"did you mean {' or '.join(repr(c) for c in close)}?"
    elif len(known) <= 20:
        cure = f"choose one of {', '.join(known)}."
    else:
        cure = f"{len(known)} are known; none has a similar name."
    return ApartError(f"unknown {kind} {name!r}: {cure} {more}".rstrip())
