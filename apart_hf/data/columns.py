"""Which columns hold images and classes."""

from __future__ import annotations

from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Image

from apart_hf.data.metadata import TARGET_NAMES
from apart_hf.data.registry import DatasetSpec
from apart_hf.errors import ApartError

INPUT_NAMES = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "picture", "photo")


def _column(
    data: Dataset, named: str | None, flag: str, kind: str, usual: tuple[str, ...], fit: list[str], make: str
) -> str:
    """Choose the column that is named, or else the first of the usual names, or else the only one of its kind.

    Args:
        usual: names in the order in which they are looked for.
        fit: columns that are taken where they are named.
        make: how other data become such a column, for messages.
    """
    own = [key for key in fit if kind == "image" or isinstance(data.features[key], ClassLabel)]
    if named in fit:
        return named
    if named is None:
        exact = [key for key in usual if key in fit]
        # a column of text that is called label is meant, not another one
        meant = next((key for key in usual if key in data.features), None) if kind != "image" else None
        if exact:
            return exact[0]
        if len(own) == 1 and meant is None:
            return own[0]
        if len(own) > 1:
            raise ApartError(f"{len(own)} {kind} columns, {', '.join(own)}; name the one to take by {flag}.")
    wanted = f"no {kind} column" if named is None else f"{named!r} is no {kind} column"
    columns = ", ".join(f"{key} ({_type_name(feature)})" for key, feature in data.features.items())
    raise ApartError(f"{wanted}: the columns are {columns}; {f'name one with {flag}' if fit else make}.")


def _type_name(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def find_input_key(data: Dataset, spec: DatasetSpec) -> str:
    """Name the column of the images: the one that is asked for, one of a usual name, or the only one.

    Raises:
        ApartError: where there is none, or several; it names all columns.
    """
    return _column(
        data,
        spec.input_key,
        "--input-key",
        "image",
        INPUT_NAMES,
        [key for key, feature in data.features.items() if isinstance(feature, Image)],
        "make one of files or their bytes by datasets' cast_column(NAME, datasets.Image())",
    )


def find_target_key(data: Dataset, spec: DatasetSpec) -> str:
    """Name the column of the classes: the one that is asked for, one of a usual name, or the only ClassLabel.

    Raises:
        ApartError: where there is none, or several; it names all columns.
    """
    integers = [key for key, feature in data.features.items() if "int" in _type_name(feature)]
    labels = [key for key, feature in data.features.items() if isinstance(feature, ClassLabel)]
    return _column(
        data,
        spec.target_key,
        "--target-key",
        "class label",
        TARGET_NAMES,
        labels + integers,
        "make one of text or other values by datasets' class_encode_column(NAME)",
    )
