"""In what order new classes come, and where timm's own reader of folders would see other ones."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence

from timm.data.readers.img_extensions import get_img_extensions

from apart_hf.data.tree import Folder, extension


def class_name(folder: str) -> str:
    """Return the name of the class that a folder or a label stands for: "café" is one, in either Unicode form."""
    return unicodedata.normalize("NFC", folder)


def natural_key(name: str) -> tuple:
    """Return the key of timm's order of classes: without case, and 2 before 10; the name itself decides a tie.

    It is `timm.utils.natural_key`, which fails for digits that are no decimals, like the superscript two.
    """
    parts = re.split(r"(\d+)", name.lower())
    return tuple(int(part) if odd % 2 else part for odd, part in enumerate(parts)), name


def in_order(names: Iterable[str]) -> list[str]:
    """Sort class names as timm's reader of image folders does."""
    return sorted(set(names), key=natural_key)


def timm_classes(folder: Folder) -> list[str]:
    """Return the classes that timm's reader finds in the folder of a split: names of the folders that images lie in.

    It reads PNG and JPEG files alone, and does not leave hidden folders out.
    """
    endings, found = get_img_extensions(as_set=True), set()
    for one in folder.walk():
        if any(extension(name) in endings for name in one.images):
            found.add("" if one is folder else one.name)
        for hidden in one.left_out:
            for path, _, files in os.walk(f"{one.path}/{hidden}", followlinks=True):
                if any(extension(name) in endings for name in files):
                    found.add(os.path.basename(path))
    return in_order(found)


def unlike_timm(folder: Folder, names: Sequence[str]) -> str | None:
    """Say in what timm's reader sees other classes in the folder of a split than `names`; None: it sees the same."""
    theirs = timm_classes(folder)
    if theirs == list(names):
        return None
    strange = [name for name in theirs if name not in names]
    missing = [name for name in names if name not in theirs]
    parts = []
    if strange:
        other = " (a name in another Unicode form)" if any(class_name(name) in names for name in strange) else ""
        parts.append(f"{len(strange)} that are none here, like {strange[0] or folder.name!r}{other}")
    if missing:
        parts.append(f"{len(missing)} fewer, like {missing[0]!r}")
    seen = " and ".join(parts) or "them in another order"
    cure = " (--class-map class_map.txt mends it)" if not strange else ""
    where = folder.inside or folder.path
    return f"timm's own reader takes the name of the folder that a PNG or JPEG lies in: in {where} it sees {seen}{cure}"
