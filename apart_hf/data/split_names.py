"""What splits are called, and which of those that are there are trained and evaluated on."""

from __future__ import annotations

import re
from collections.abc import Iterable

from apart_hf.errors import ApartError

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("validation", "valid", "val", "eval", "dev", "test", "testing")
# names of one meaning
_MEANINGS = (TRAIN_NAMES, VAL_NAMES[:3], VAL_NAMES[3:4], VAL_NAMES[4:5], VAL_NAMES[5:])
_USUAL = ("train", "validation", "test")  # what `datasets` calls the splits of a folder, whatever they are called there
# data/train-00000-of-00004.parquet, as the Hub and `datasets` call the parts of a split
_SHARD = re.compile(r"(?P<split>.+)-\d+-of-\d+(-[0-9a-f]+)?")


def meaning(name: str) -> tuple[str, ...] | None:
    """Return all names, in lower case, of the split that is called so; None: that is no name of a split."""
    return next((names for names in _MEANINGS if name.lower() in names), None)


def in_usual_order(splits: Iterable[str]) -> list[str]:
    """Sort the names of splits: those to train on, those to evaluate on in the order of preference, others."""
    usual = [*TRAIN_NAMES, *VAL_NAMES]
    return sorted(splits, key=lambda name: (usual.index(name.lower()) if name.lower() in usual else len(usual), name))


def same_split(one: str, other: str) -> bool:
    """Tell whether two names mean one split, as validation and val do."""
    return one == other or (meaning(one) is not None and meaning(one) == meaning(other))


def split_of_file(inside: str) -> str | None:
    """Tell the split that a file belongs to from its path within the data; None: the path does not say.

    The Hub's form SPLIT-00000-of-00001 says it, else a folder or a file of the split's whole name, else one word in the
    name of the file (train_0, 0001-test).
    """
    *folders, file = inside.split("/")
    stem = file[: file.rfind(".")] if "." in file else file
    shard = _SHARD.fullmatch(stem)
    if shard is not None:
        return shard["split"]
    for name in (stem, *reversed(folders)):
        if meaning(name) is not None:
            return name
    words = [word for word in re.split(r"[-_. ]+", stem) if meaning(word) is not None]
    return words[0] if len({meaning(word) for word in words}) == 1 else None


def _find(splits: Iterable[str], named: str) -> str | None:
    """Find a split by its own name, else without case, else by the name that `datasets` would give it."""
    splits = list(splits)
    for alike in (
        [name for name in splits if name == named],
        [name for name in splits if name.lower() == named.lower()],
        [name for name in splits if named in _USUAL and same_split(name, named)],
    ):
        if len(alike) == 1:
            return alike[0]
    return None


def pick_split(
    splits: Iterable[str], named: str | None, usual: tuple[str, ...], flag: str, more: str = "", seen: str | None = None
) -> str:
    """Choose a split.

    Args:
        splits: those that are there.
        named: what the user asks for; None: the first of `usual` that is there, without case.
        usual: names in the order in which they are looked for.
        flag: by which the user names one, for messages.
        more: another cure, for messages.
        seen: what is there in the place of splits, for messages.

    Raises:
        ApartError: where there is none, or two of one meaning.
    """
    splits = list(splits)
    if named is not None:
        found = _find(splits, named)
    else:
        found = next((split for name in usual for split in splits if split.lower() == name), None)
        alike = [split for split in splits if found is not None and same_split(split, found)]
        if len(alike) > 1:
            raise ApartError(f"{' and '.join(alike)} are splits of one meaning; name the one to take by {flag}.")
    if found is None:
        wanted = f"no split {named!r}" if named is not None else f"no split called {' or '.join(usual)}"
        there = seen or f"the splits are {', '.join(splits)}"
        raise ApartError(f"{wanted}: {there}; name one with {flag}{more}.")
    return found
