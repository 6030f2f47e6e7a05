"""What the classes are called, and how the data's own class indices become those of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from apart_hf.data.class_map import read_class_map
from apart_hf.data.class_order import class_name
from apart_hf.data.registry import DatasetSpec
from apart_hf.data.settings import DataSettings
from apart_hf.data.splits import Split
from apart_hf.errors import ApartError, shown


def own_names(split: Split) -> list[str] | None:
    """Return what the data call the classes of a split; None: they are numbers without names."""
    names = getattr(split.data.features[split.target_key], "names", None)  # of a ClassLabel, or of packed data
    return None if names is None else [class_name(name) for name in names]


def counts_from_one(splits: Sequence[Split], settings: DataSettings) -> bool:
    """Tell whether nameless labels are 1 to K: no split has a 0, and there are not to be K + 1 classes."""
    if any(own_names(split) is not None or not split.rows_known or not len(split) for split in splits):
        return False
    found = [split.labels() for split in splits]
    largest, names = max(int(labels.max()) for labels in found), settings.class_names
    if min(int(labels.min()) for labels in found) < 1:
        return False
    if names is None and settings.class_map is not None:
        names = read_class_map(settings.class_map)
    if names is not None:
        return len(names) == largest or names[0] == "1"
    return settings.num_classes != largest + 1


def find_class_names(splits: Sequence[Split], spec: DatasetSpec, settings: DataSettings, from_one: bool) -> list[str]:
    """Name the classes by their index: as asked for, from the data, or else by numbers up to the largest label.

    Args:
        splits: the training split, then those that are evaluated.
        spec: where the data are from, and how many classes they should have.
        settings: what the user asks for.
        from_one: whether labels without names begin with 1.

    Returns:
        One name for each class index.

    Raises:
        ApartError: where these disagree, or nothing tells how many classes there are.
    """
    split, expected = splits[0], None if spec.local else spec.num_classes
    found = own_names(split)
    if found is not None and settings.class_order is not None and settings.class_map is None:
        order = [class_name(name) for name in settings.class_order]
        found = order if sorted(order) == sorted(found) else found
    if settings.class_names is not None:
        return _of_model([class_name(name) for name in settings.class_names], found, splits, settings)
    if settings.class_map is not None:
        names = read_class_map(settings.class_map, None if found is None else set(found))
        if found is not None and (strange := sorted(set(found) ^ set(names))):
            raise ApartError(
                f"--class-map {settings.class_map}: {len(strange)} class names are not in both it and the data, the "
                f"first is {strange[0]!r}; it needs every class of the data once."
            )
        return list(names)
    if found is None and not split.rows_known:
        count = settings.num_classes or spec.num_classes
        if count is None:
            raise ApartError(f"{spec.path} names no classes, and a stream is not counted: give --num-classes.")
        found = [str(i) for i in range(count)]
    elif found is None:
        found = _numbers(splits if from_one else splits[:1], settings, expected, from_one)
    if expected not in (None, len(found)):
        raise ApartError(f"{spec.path} should have {expected} classes, but has {len(found)}; is it another dataset?")
    return found


def _of_model(names: list[str], found: list[str] | None, splits: Sequence[Split], settings: DataSettings) -> list[str]:
    """Keep the names that a model or a run records, where the data have no other classes with images in them."""
    if found is None:
        return names
    used = set()
    for split in splits:
        own = own_names(split) or []
        used |= set(own) if not split.rows_known else {own[i] for i in np.unique(split.labels()) if 0 <= i < len(own)}
    strange = sorted(used - set(names))
    missing = [] if settings.only is not None else sorted(set(names) - set(found))
    if strange or missing:
        raise ApartError(
            f"the model: {len(strange + missing)} class names are not in both it and the data, the first is "
            f"{(strange + missing)[0]!r}; it needs images of its own classes (--dataset, --data-dir)."
        )
    return names


def _numbers(splits: Sequence[Split], settings: DataSettings, expected: int | None, from_one: bool) -> list[str]:
    labels = np.concatenate([split.labels() for split in splits])
    largest = int(np.max(labels, initial=-1))
    if settings.num_classes is None and largest >= max(len(labels), 1):
        split, first = splits[0], int(labels.argmax())
        if first >= len(split):
            split, first = splits[-1], first - len(split)
        raise ApartError(
            f"split {split.name!r}: label {largest} at index {first} ({split.origin(first, split.target_key)}) would "
            f"make {largest + 1} classes of {len(labels)} images; correct it, or name the number of classes by "
            "--num-classes."
        )
    if from_one:
        return [str(i + 1) for i in range(settings.num_classes or max(largest, expected or 0))]
    return [str(i) for i in range(settings.num_classes or max(largest + 1, expected or 0))]


def relabelling(split: Split, names: list[str], from_one: bool, flexible: bool, train: str) -> np.ndarray | None:
    """Return the class index by the data's own one, -1 where it is none of `names`; None: they are the same.

    Args:
        split: whose labels.
        names: by class index.
        from_one: whether labels without names begin with 1.
        flexible: whether the data may have the classes in another order, or only some of them.
        train: name of the training split, for messages.

    Raises:
        ApartError: where the classes are others.
    """
    own = own_names(split)
    if own is None:
        return np.arange(-1, len(names)) if from_one else None
    if own == names:
        return None
    if not flexible:
        raise ApartError(
            f"split {split.name!r} has {len(own)} classes and split {train!r} {len(names)}, or in "
            "another order; both splits need the same classes in the same order."
        )
    index = {name: position for position, name in enumerate(names)}
    return np.array([index.get(name, -1) for name in own])


def check_labels(split: Split, classes: int) -> None:
    """See that every label of a split is a class index, before they are renamed; not of a stream.

    Raises:
        ApartError: naming the first that is not.
    """
    labels = replace(split, relabel=None).labels()
    highest = classes - 1 if split.relabel is None else len(split.relabel) - 1
    inside = (labels >= 0) & (labels <= highest)
    if split.relabel is not None:
        inside &= split.relabel[np.where(inside, labels, 0)] >= 0
    bad = np.flatnonzero(~inside)
    if len(bad):
        raise ApartError(
            f"split {split.name!r}: {len(bad)} labels are outside 0..{highest}, the first at index {bad[0]} "
            f"({labels[bad[0]]}), in {split.origin(int(bad[0]), split.target_key)}; correct the labels, or choose a "
            "labelled split."
        )


def compare_classes(train: Split, val: Split, names: Sequence[str]) -> list[str]:
    """Say which classes have images in one of the two splits alone.

    Returns:
        Lines for the user; none where all is well.

    Raises:
        ApartError: where no class that is evaluated is trained.
    """
    counts = [np.bincount(split.labels(), minlength=len(names)) > 0 for split in (train, val)]
    untrained = [names[i] for i in np.flatnonzero(~counts[0] & counts[1]).tolist()]
    unseen = [names[i] for i in np.flatnonzero(counts[0] & ~counts[1]).tolist()]
    if not (counts[0] & counts[1]).any():
        raise ApartError(
            f"split {val.name!r} has no image of a class that split {train.name!r} has: "
            f"{shown(untrained, 'class')} against {shown(unseen, 'class')}; both need the same class folders."
        )
    lines = []
    if untrained:
        lines.append(f"{shown(untrained, 'class')} with images in split {val.name!r} and none to train on")
    if unseen:
        lines.append(f"{shown(unseen, 'class')} with training images and none in split {val.name!r}")
    return lines
