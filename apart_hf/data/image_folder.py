"""Folders of images: which folders are splits and which are classes, and the table of paths and labels."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, Value

from apart_hf.data.class_order import class_name, in_order, unlike_timm
from apart_hf.data.metadata import FILES, Metadata, has_metadata, read_metadata
from apart_hf.data.settings import Only
from apart_hf.data.split_names import TRAIN_NAMES, VAL_NAMES, in_usual_order, meaning
from apart_hf.data.tree import Folder
from apart_hf.errors import ApartError, shown

WHOLE = "train"  # what class folders that lie in no split are called


def class_folders(folder: Folder) -> list[Folder]:
    """Return the folders directly in it with images in them or below them: the classes, where it is a split."""
    return [one for one in folder.folders if one.has_images]


def _only_splits(folder: Folder) -> bool:
    """Tell whether all folders in it are splits, whose images then have no class folders."""
    return all(meaning(one.name) for one in class_folders(folder))


def _has_metadata(folder: Folder) -> bool:
    return folder.has_images and has_metadata(folder)


class ImageFolder:
    """Finds the splits of a folder of images, and makes their tables.

    A split is a folder of a split's whole name, in any case, that holds class folders; splits lie in `root`, or in one
    folder of it. Where there is none, class folders lie in `root` itself, and are the one split "train". A class is a
    folder directly below its split, with all images in it and below it. Where a split has no class folders, or a single
    one, a file metadata.csv or metadata.jsonl in it may tell the labels.

    Args:
        root: what the user named.
        asked: names of splits that the user gives, beside the usual ones.
        only: one split is wanted, to train on or to evaluate on: that those for the other are left out is not noted.

    Raises:
        ApartError: where several folders could be meant.
    """

    def __init__(self, root: Folder, asked: Iterable[str] = (), only: Only | None = None):
        self._asked = {name.lower() for name in asked}
        self._unwanted = {None: (), "train": VAL_NAMES, "val": TRAIN_NAMES}[only]
        self.notes: list[str] = []  # what is left out, in words
        self.timm: str | None = None  # in what timm's reader sees other classes
        self.labels_from: str | None = None
        self.base, self.named = self._find(root)
        if self.named:
            found = self._splits_in(self.base)
        else:
            found = [root] if not _only_splits(root) or _has_metadata(root) else []
        self.folders = {one.name if self.named else WHOLE: one for one in found}

    def _splits_in(self, folder: Folder) -> list[Folder]:
        found = (one for one in folder.folders if meaning(one.name) or one.name.lower() in self._asked)
        return [one for one in found if class_folders(one) or _has_metadata(one)]

    def _find(self, root: Folder) -> tuple[Folder, bool]:
        """Return the folder that holds the splits, and whether any is there."""
        if self._splits_in(root):
            return root, True
        below = [one for one in root.folders if self._splits_in(one)]
        if len(below) > 1:
            raise ApartError(
                f"{root.path}: splits lie in {shown([one.inside for one in below], 'folder')}; name the one that is "
                "meant by --data-dir."
            )
        return (below[0], True) if below else (root, False)

    @property
    def seen(self) -> str | None:
        """Say why there is no split beside "train", where that is so."""
        if self.named:
            return None
        folders = shown([one.name for one in class_folders(self.base)], "folder")
        return f"{self.base.path} has {folders}, of which none is called so: they are taken as the classes of one split"

    @property
    def splits(self) -> list[str]:
        """Return the names of the splits."""
        return in_usual_order(self.folders)

    def load(self, names: Iterable[str]) -> dict[str, Dataset]:
        """Make the tables of these splits, with the classes that lie in any of them, in timm's order.

        Raises:
            ApartError: where a split gets its labels as numbers and another as names.
        """
        names = list(names)
        if self.named:
            self._note_others(names)
        told = {name: self._metadata(self.folders[name]) for name in names}
        found = {
            name: _by_metadata(told_here) if told_here is not None else self._by_folders(self.folders[name])
            for name, told_here in told.items()
        }
        by_file = sorted(one.inside for one in told.values() if one is not None)
        self.labels_from = " and ".join((["class folders"] if len(by_file) < len(names) else []) + by_file)
        kinds = {isinstance(label, int) for split in found.values() for label in split}
        if len(kinds) > 1:
            raise ApartError(f"{self.base.path}: some labels are numbers and others names; write one kind in all.")
        if kinds == {True}:
            return {name: image_table(split, None) for name, split in found.items()}
        classes = in_order(str(label) for split in found.values() for label in split)
        if not any(told.values()):
            differ = (unlike_timm(self.folders[name], classes) for name in names)
            self.timm = next((text for text in differ if text is not None), None)
        return {name: image_table(split, classes) for name, split in found.items()}

    def _metadata(self, folder: Folder) -> Metadata | None:
        """Read the file that tells the labels of a split, where no class folders do."""
        if len(class_folders(folder)) > 1 and (self.named or not _only_splits(folder)):
            beside = [f"{folder.inside}{name}" for name in FILES if name in folder.others]
            if beside:
                self.notes.append(f"{', '.join(beside)} is not read: the class folders tell the labels")
            return None
        return read_metadata(folder)

    def _by_folders(self, folder: Folder) -> dict[str | int, list[pa.Array]]:
        """Find the images of each class; a name in two Unicode forms is one class of two folders."""
        where = folder.inside or f"{folder.path}/"
        if folder.images:
            self.notes.append(f"{shown(folder.images, 'image')} directly in {where} in no class folder: left out")
        empty = [one.name for one in folder.folders if not one.has_images and not one.held_runs]
        if empty:
            self.notes.append(f"{shown(empty, 'folder')} in {where} without images: no class")
        odd = [f"{one.inside}{name}/" for one in folder.walk() for name in one.left_out if not name.startswith(".")]
        if odd:
            self.notes.append(f"{shown(odd, 'folder')} of thumbnails or of the system: left out")
        unread = folder.other_files(".heic", ".heif")
        if unread:
            self.notes.append(
                f"{shown(unread, 'HEIC file')}: left out, since Pillow cannot read them; pip install pillow-heif, or "
                "convert them"
            )
        found: dict[str | int, list[pa.Array]] = {}
        for one in class_folders(folder):
            found.setdefault(class_name(one.name), []).append(_array(list(one.files()), one))
        return found

    def _note_others(self, names: Sequence[str]) -> None:
        """Say what lies beside the splits that are taken."""
        left_out = (one for one in self.base.folders if one.name not in names and one.has_images)
        others = [f"{one.name}/" for one in left_out if one.name.lower() not in self._unwanted]
        others += self.base.images
        if others:
            taken = ", ".join(f"{name}/" for name in names)
            self.notes.append(f"{shown(others, 'other')} beside {taken}: passed over")


def _by_metadata(told: Metadata) -> dict[str | int, list[pa.Array]]:
    labels = np.array(told.labels, dtype=object)
    paths = pa.array(told.paths, pa.string())
    found: dict[str | int, list[pa.Array]] = {}
    for label in dict.fromkeys([*told.labels]):
        name = class_name(label) if isinstance(label, str) else label
        found.setdefault(name, []).append(paths.take(np.flatnonzero(labels == label)))
    return found


def _array(paths: list[str], folder: Folder) -> pa.Array:
    try:
        return pa.array(paths, pa.string())
    except (UnicodeEncodeError, pa.ArrowInvalid) as error:
        raise ApartError(f"the folder {folder.inside!r} holds a file whose name is no UTF-8; rename it.") from error


def image_table(classes: dict[str | int, list[pa.Array]], names: Sequence[str] | None) -> Dataset:
    """Make a dataset of image files in the form that the builders of `datasets` give it, in the order of the paths.

    Args:
        classes: the paths of the images of each class, in parts that are sorted.
        names: of the classes by index; None: the classes are whole numbers.
    """
    index = {name: position for position, name in enumerate(names)} if names is not None else {}
    parts = [(paths, index.get(str(name), name)) for name, several in classes.items() for paths in several]
    parts = sorted((part for part in parts if len(part[0])), key=lambda part: part[0][0].as_py())
    paths = pa.concat_arrays([part[0] for part in parts])
    labels = np.repeat(np.array([part[1] for part in parts], dtype=np.int64), [len(part[0]) for part in parts])
    if any(one[0][-1].as_py() > other[0][0].as_py() for one, other in itertools.pairwise(parts)):
        order = pa.compute.sort_indices(paths)
        paths, labels = paths.take(order), labels[order.to_numpy()]
    digest = hashlib.sha256(repr(names).encode() + labels.tobytes())
    for buffer in paths.buffers():
        if buffer is not None:
            digest.update(buffer)
    images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
    kind = Value("int64") if names is None else ClassLabel(names=list(names))
    features = Features({"image": Image(decode=False), "label": kind})
    table = pa.table({"image": images, "label": pa.array(labels)}).cast(features.arrow_schema)
    return Dataset(table, DatasetInfo(features=features), fingerprint=digest.hexdigest()[:16])
