"""The one exception that means "the caller can fix this"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_SHOWN = 3  # names in a message
_LONGEST = 100  # characters of a value


class ApartError(ValueError):
    """Tells of bad input: the message is one line that says what is wrong, with the numbers, and the cure.

    It is a ValueError. Scripts print it and exit with code 2; every other exception is a fault of the program and keeps
    its traceback.

    Example:
        >>> import timm
        >>> from apart_hf import ApartError, create_strategy
        >>> model = timm.create_model("test_vit")
        >>> try:
        ...     create_strategy("apart", model)
        ... except ApartError as error:
        ...     print(str(error).split(",")[0])
        VisionTransformer has no BatchNorm layer
    """


class OneProcessError(ApartError):
    """Tells of bad input that one process of a run has met: it says so, whether others have met the like or not."""


def one_line(error: ApartError) -> str:
    """Return the message of an error; in a loader process it is the last line of a traceback."""
    last = str(error).strip().splitlines()[-1]
    return last.removeprefix(f"{ApartError.__module__}.{type(error).__name__}: ")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def unknown_name(kind: str, name: str, known: Iterable[str], more: str = "") -> ApartError:
    """Make an error for a misspelt name, which names the closest of `known`, or all where they are few; then `more`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        cure = f"did you mean {' or '.join(repr(c) for c in close)}?"
    elif len(known) <= 20:
        cure = f"choose one of {', '.join(known)}."
    else:
        cure = f"{len(known)} are known; none has a similar name."
    return ApartError(f"unknown {kind} {name!r}: {cure} {more}".rstrip())


def shown(names: Sequence[str], kind: str) -> str:
    """Write "4 folders (a, b, c, ...)", for messages; `kind` is one of them, in English."""
    more = ", ..." if len(names) > _SHOWN else ""
    plural = "" if len(names) == 1 else "es" if kind.endswith("s") else "s"
    return f"{len(names)} {kind}{plural} ({', '.join(names[:_SHOWN])}{more})"


def written(value: object) -> str:
    """Write a value of the user's in one line, as tensors and modules do not write themselves, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
