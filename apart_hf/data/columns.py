"""Which columns hold images and classes, and what the classes are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Image

from apart_hf.data.registry import DatasetSpec
from apart_hf.data.settings import DataSettings
from apart_hf.data.splits import Split
from apart_hf.errors import ApartError


def _column(data: Dataset, named: str | None, flag: str, kind: str, found: list[str], fit: list[str], make: str) -> str:
    """Choose the column that is named, or else the first that is found.

    Args:
        found: columns that are taken unnamed.
        fit: those that are taken where they are named.
        make: how other data become such a column, for messages.
    """
    if named is None and found:
        return found[0]
    if named in fit:
        return named
    wanted = f"no {kind} column" if named is None else f"{named!r} is no {kind} column"
    columns = ", ".join(f"{key} ({_type_name(feature)})" for key, feature in data.features.items())
    raise ApartError(f"{wanted}: the columns are {columns}; {f'name one with {flag}' if fit else make}.")


def _type_name(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def find_input_key(data: Dataset, spec: DatasetSpec) -> str:
    images = [key for key, feature in data.features.items() if isinstance(feature, Image)]
    return _column(
        data,
        spec.input_key,
        "--input-key",
        "image",
        images,
        images,
        "make one of files or their bytes by datasets' cast_column(NAME, datasets.Image())",
    )


def find_target_key(data: Dataset, spec: DatasetSpec) -> str:
    labels = [key for key, feature in data.features.items() if isinstance(feature, ClassLabel)]
    integers = [key for key, feature in data.features.items() if "int" in _type_name(feature)]
    return _column(
        data,
        spec.target_key,
        "--target-key",
        "class label",
        labels + [key for key in integers if "label" in key],
        labels + integers,
        "make one of text or other values by datasets' class_encode_column(NAME)",
    )


def find_class_names(split: Split, spec: DatasetSpec, settings: DataSettings) -> list[str]:
    """Name the classes by their index: from --class-map, from the data, or else by numbers up to the largest label.

    Args:
        split: the training split.
        spec: where the data are from, and how many classes they should have.
        settings: what the user asks for.

    Returns:
        One name for each class index.

    Raises:
        ApartError: where these disagree, or nothing tells how many classes there are.
    """
    feature, expected = split.data.features[split.target_key], None if spec.local else spec.num_classes
    found = list(feature.names) if isinstance(feature, ClassLabel) else None
    names, where = settings.class_names, "the model"
    if settings.class_map is not None:
        names, where = _read_class_map(settings.class_map), f"--class-map {settings.class_map}"
    if names is not None:
        if found is not None and (strange := sorted(set(found) ^ set(names))):
            raise ApartError(
                f"{where}: {len(strange)} class names are not in both it and the data, the first is {strange[0]!r}; it "
                "needs every class of the data once."
            )
        return list(names)
    if found is None and settings.streaming:
        count = settings.num_classes or spec.num_classes
        if count is None:
            raise ApartError(f"{spec.path} names no classes, and a stream is not counted: give --num-classes.")
        found = [str(i) for i in range(count)]
    elif found is None:
        labels = split.labels()
        largest = int(np.max(labels, initial=-1))
        if settings.num_classes is None and largest >= max(len(labels), 1):
            raise ApartError(
                f"split {split.name!r}: label {largest} at index {labels.argmax()} would make {largest + 1} "
                f"classes of {len(labels)} images; correct it, or name the number of classes by --num-classes."
            )
        found = [str(i) for i in range(settings.num_classes or max(largest + 1, expected or 0))]
    if expected not in (None, len(found)):
        raise ApartError(f"{spec.path} should have {expected} classes, but has {len(found)}; is it another dataset?")
    return found


def _read_class_map(path: str) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in Path(path).read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ApartError(f"--class-map {path}: cannot be read ({reason}).") from error
    if not names or len(set(names)) < len(names):
        raise ApartError(f"--class-map {path}: needs class names, one a line, each once.")
    return names
