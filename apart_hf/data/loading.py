"""From a dataset name or a folder to two splits of (image, class index), checked before training starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image

from apart_hf.data.registry import DatasetSpec, find_dataset
from apart_hf.errors import ApartError

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("validation", "valid", "val", "eval", "test")


@dataclass(frozen=True)
class ImageData:
    """Two splits of an image classification dataset.

    Args:
        train, val: map-style `datasets.Dataset`s.
        spec: with every name resolved.
        class_names: by class index.
        image_size: (width, height) in pixels of the first training image.
    """

    train: Dataset
    val: Dataset
    spec: DatasetSpec
    class_names: list[str]
    image_size: tuple[int, int]


def load_image_data(
    dataset: str = "demo", data_dir: str | None = None, *, train_split: str | None = None, val_split: str | None = None,
    input_key: str | None = None, target_key: str | None = None, num_classes: int | None = None,
) -> ImageData:
    """Load a registered dataset, a Hub id, or the folder `data_dir` (parquet files, image folders, or save_to_disk).

    A registered name beside a folder lends it splits, columns, normalisation and transform, as far as the folder has
    them. Splits and columns that are not named are found: the split called train, the one called validation, valid, val
    or test, the first Image column and the first ClassLabel (else integer `label`) column.

    Raises: ApartError naming what exists where something does not, and the first bad label.
    """
    named = {"train_split": train_split, "val_split": val_split, "input_key": input_key, "target_key": target_key}
    given = {key: value for key, value in named.items() if value is not None}
    spec = replace(find_dataset(dataset, data_dir), **given)
    splits = _load(spec)
    if spec.local:
        spec = _only_what_is_there(spec, splits, given)
    spec = replace(
        spec,
        train_split=_pick_split(splits, spec.train_split, TRAIN_NAMES, "--train-split"),
        val_split=_pick_split(splits, spec.val_split, VAL_NAMES, "--val-split"),
    )
    train, val = splits[spec.train_split], splits[spec.val_split]
    spec = replace(spec, input_key=_input_key(train, spec), target_key=_target_key(train, spec))
    names = _class_names(train, spec)
    for split, data in ((spec.train_split, train), (spec.val_split, val)):
        _check_split(data, split, spec, names)
    if num_classes is not None and num_classes != len(names):
        raise ApartError(f"--num-classes {num_classes}, but {spec.path} has {len(names)} classes; leave the flag out.")
    try:
        size = train[0][spec.input_key].size
    except (OSError, ValueError) as error:
        raise bad_image(spec.train_split, 0, error) from error
    return ImageData(train, val, spec, names, size)


def _only_what_is_there(spec: DatasetSpec, splits: DatasetDict, given: dict[str, str]) -> DatasetSpec:
    """Without the registered names that a folder does not use, so that its own are found; `given` names stay."""
    columns = {key for data in splits.values() for key in data.features}
    there = {"train_split": splits, "val_split": splits, "input_key": columns, "target_key": columns}
    return replace(spec, **{
        key: None for key, names in there.items() if key not in given and getattr(spec, key) not in names
    })


def bad_image(split: str, index: int, error: Exception) -> ApartError:
    return ApartError(f"image {index} of split {split!r} cannot be decoded ({error}); replace or remove it.")


def first_bad_image(data: Dataset, split: str, indices: list[int], error: Exception) -> ApartError:
    """What to say of the first of `indices` that cannot be decoded, where a look-up of all of them raised `error`."""
    for index in indices:
        try:
            if any(value is None for value in data[index].values()):
                return bad_image(split, index, ValueError("there is none"))
        except (OSError, ValueError) as found:
            return bad_image(split, index, found)
    return bad_image(split, indices[0], error)


def _load(spec: DatasetSpec) -> DatasetDict:
    folder = Path(spec.path)
    if spec.local and not folder.is_dir():
        raise ApartError(f"--data-dir {spec.path} does not exist, or is no folder.")
    try:
        if not spec.local:
            return datasets.load_dataset(spec.path, spec.config)
        if (folder / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(folder))
        kind = "parquet" if any(folder.rglob("*.parquet")) else "imagefolder"
        return datasets.load_dataset(kind, data_dir=str(folder))
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        # one line of a message that is often a page long
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        cure = (
            "it needs parquet files, one folder of images a class, or a save_to_disk folder." if spec.local else
            "check the name and the connection, log in (hf auth login) where it is gated, or use --data-dir."
        )
        raise ApartError(f"cannot load {spec.path}: {reason.rstrip('.')}; {cure}") from error


def _pick_split(splits: DatasetDict, named: str | None, usual: tuple[str, ...], flag: str) -> str:
    candidates = [named] if named is not None else usual
    for name in candidates:
        if name in splits:
            return name
    wanted = f"no split {named!r}" if named is not None else f"no split called {' or '.join(usual)}"
    raise ApartError(f"{wanted}: the splits are {', '.join(splits)}; name one with {flag}.")


def _column(data: Dataset, named: str | None, flag: str, fits, kind: str) -> str:
    found = [key for key, feature in data.features.items() if fits(key, feature)]
    if named is None and found:
        return found[0]
    if named in data.features and named in found:
        return named
    wanted = f"no {kind} column" if named is None else f"{named!r} is no {kind} column"
    columns = ", ".join(f"{key} ({_type_name(feature)})" for key, feature in data.features.items())
    raise ApartError(f"{wanted}: the columns are {columns}; name one with {flag}.")


def _type_name(feature) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def _input_key(data: Dataset, spec: DatasetSpec) -> str:
    return _column(data, spec.input_key, "--input-key", lambda _, feature: isinstance(feature, Image), "image")


def _target_key(data: Dataset, spec: DatasetSpec) -> str:
    def is_label(key, feature):
        integer = isinstance(feature, datasets.Value) and "int" in feature.dtype
        return isinstance(feature, ClassLabel) or (integer and ("label" in key or key == spec.target_key))

    return _column(data, spec.target_key, "--target-key", is_label, "class label")


def _class_names(data: Dataset, spec: DatasetSpec) -> list[str]:
    feature = data.features[spec.target_key]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    return [str(i) for i in range(int(np.max(_labels(data, spec), initial=-1)) + 1)]


def _labels(data: Dataset, spec: DatasetSpec) -> np.ndarray:
    return labels_of(data, spec.target_key)


def labels_of(data: Dataset, target_key: str) -> np.ndarray:
    """The class indices (N,) of a split."""
    table = data.select_columns([target_key]).with_format("arrow")[:]  # reads no image
    return table[target_key].to_numpy()


def _check_split(data: Dataset, split: str, spec: DatasetSpec, names: list[str]) -> None:
    if not len(data):
        raise ApartError(f"split {split!r} of {spec.path} is empty.")
    for key, flag in ((spec.input_key, "--input-key"), (spec.target_key, "--target-key")):
        if key not in data.features:
            raise ApartError(f"split {split!r} has no column {key!r}, only {', '.join(data.features)}; see {flag}.")
    feature = data.features[spec.target_key]
    if isinstance(feature, ClassLabel) and list(feature.names) != names:
        raise ApartError(
            f"split {split!r} has {len(feature.names)} classes and split {spec.train_split!r} {len(names)}, or in "
            "another order; both splits need the same classes in the same order."
        )
    labels = _labels(data, spec)
    bad = np.flatnonzero(~((labels >= 0) & (labels < len(names))))
    if len(bad):
        raise ApartError(
            f"split {split!r}: {len(bad)} labels are outside 0..{len(names) - 1}, the first at index {bad[0]} "
            f"({labels[bad[0]]}); correct the labels, or choose a labelled split."
        )
