"""From a dataset name or a folder to splits of (image, class index), checked before training starts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict

from apart_hf.data.columns import find_class_names, find_input_key, find_target_key
from apart_hf.data.registry import DATASETS, DatasetSpec, find_dataset
from apart_hf.data.settings import DataSettings
from apart_hf.data.sources import open_splits
from apart_hf.data.splits import Split, stratified
from apart_hf.errors import ApartError

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("validation", "valid", "val", "eval", "test")


@dataclass(frozen=True)
class ImageData:
    """Holds the splits of an image classification dataset.

    Args:
        train: what is trained on.
        val: what is evaluated after every epoch, and picks the best one.
        spec: with every name resolved.
        class_names: by class index.
        image_size: (width, height) in pixels of the first training image.
        test: what is looked at once, at the end, where `val` is a part of the training split.
    """

    train: Split
    val: Split
    spec: DatasetSpec
    class_names: list[str]
    image_size: tuple[int, int]
    test: Split | None = field(default=None)

    @property
    def held_out(self) -> Split:
        """Return the split that final results are of."""
        return self.val if self.test is None else self.test


def load_image_data(settings: DataSettings | None = None) -> ImageData:
    """Load a registered dataset, a Hub id, or a folder (parquet files, image folders, or save_to_disk).

    A registered name beside a folder lends it splits, columns, normalisation and transform, as far as the folder has
    them. Splits and columns that are not named are found: the split called train, the one called validation, valid, val
    or test, the first Image column and the first ClassLabel (else integer `label`) column.

    Returns:
        The splits, with labels that are checked.

    Raises:
        ApartError: naming what exists where something does not, and the first bad label.
    """
    settings = settings or DataSettings()
    spec = _as_named(find_dataset(settings.dataset, settings.data_dir), settings.named)
    if settings.dataset_config is not None:
        if spec.local:
            raise ApartError(f"--dataset-config {settings.dataset_config}: {spec.path} is a folder; leave it out.")
        spec = replace(spec, config=settings.dataset_config)
    splits = open_splits(spec, settings.streaming)
    if spec.local:
        spec = _only_what_is_there(spec, splits, settings.named)
    train_name, val_name = _pick_split(splits, spec.train_split, TRAIN_NAMES, "--train-split"), spec.val_split
    if settings.val_fraction is None or val_name is not None or set(VAL_NAMES) & set(splits):
        val_name = _pick_split(splits, val_name, VAL_NAMES, "--val-split")
    data = splits[train_name]
    columns = find_input_key(data, spec), find_target_key(data, spec)
    spec = replace(spec, train_split=train_name, val_split=val_name, input_key=columns[0], target_key=columns[1])
    names = find_class_names(Split.of(data, train_name, *columns), spec, settings)
    if settings.num_classes is not None and settings.num_classes != len(names):
        raise ApartError(
            f"--num-classes {settings.num_classes}, but {spec.path} has {len(names)} classes; leave the flag out."
        )
    train = val = _checked(splits[train_name], train_name, columns, spec, names, settings)
    test = None
    if val_name not in (None, train_name):
        val = _checked(splits[val_name], val_name, columns, spec, names, settings)
    if settings.val_fraction is not None:
        if val_name == train_name:
            raise ApartError(f"--val-fraction: {train_name!r} is both --train-split and --val-split; drop one.")
        test = None if val_name is None else val
        rest, part = stratified(train.labels(), settings.val_fraction, settings.seed)
        train, val = train.part(rest), train.part(part)
    return ImageData(train, val, spec, names, train.image_size(settings.skip_bad), test)


def _as_named(spec: DatasetSpec, given: dict[str, str]) -> DatasetSpec:
    """Put in the splits and columns that the user names."""
    return replace(
        spec,
        train_split=given.get("train_split", spec.train_split),
        val_split=given.get("val_split", spec.val_split),
        input_key=given.get("input_key", spec.input_key),
        target_key=given.get("target_key", spec.target_key),
    )


def _only_what_is_there(spec: DatasetSpec, splits: DatasetDict, given: dict[str, str]) -> DatasetSpec:
    """Drop the registered names that a folder does not use, so that its own are found."""
    columns = {key for data in splits.values() for key in data.features}
    there = replace(
        spec,
        train_split=spec.train_split if spec.train_split in splits else None,
        val_split=spec.val_split if spec.val_split in splits else None,
        input_key=spec.input_key if spec.input_key in columns else None,
        target_key=spec.target_key if spec.target_key in columns else None,
    )
    return _as_named(there, given)


def _pick_split(splits: DatasetDict, named: str | None, usual: tuple[str, ...], flag: str) -> str:
    candidates = (named,) if named is not None else usual
    for name in candidates:
        if name in splits:
            return name
    wanted = f"no split {named!r}" if named is not None else f"no split called {' or '.join(usual)}"
    part = ", or keep a part of the training split: --val-fraction 0.1" if flag == "--val-split" else ""
    raise ApartError(f"{wanted}: the splits are {', '.join(splits)}; name one with {flag}{part}.")


def _checked(
    data: Dataset, name: str, columns: tuple[str, str], spec: DatasetSpec, names: list[str], settings: DataSettings
) -> Split:
    """Make the split called `name`, check its labels and put them in the order of `names`."""
    for key, flag in zip(columns, ("--input-key", "--target-key")):
        if key not in data.features:
            raise ApartError(f"split {name!r} has no column {key!r}, only {', '.join(data.features)}; see {flag}.")
    split = Split.of(data, name, *columns)
    feature, relabel = data.features[split.target_key], None
    own = list(feature.names) if isinstance(feature, ClassLabel) else names
    if own != names:
        if (settings.class_map or settings.class_names) is None or set(own) != set(names):
            raise ApartError(
                f"split {name!r} has {len(own)} classes and split {spec.train_split!r} {len(names)}, or in "
                "another order; both splits need the same classes in the same order."
            )
        relabel = np.array([names.index(one) for one in own])
    if settings.streaming:
        return replace(split, size=_stream_size(split, spec, settings), relabel=relabel)
    if not len(split):
        raise ApartError(f"split {name!r} of {spec.path} is empty.")
    labels = split.labels()
    bad = np.flatnonzero(~((labels >= 0) & (labels < len(names))))
    if len(bad):
        raise ApartError(
            f"split {name!r}: {len(bad)} labels are outside 0..{len(names) - 1}, the first at index {bad[0]} "
            f"({labels[bad[0]]}); correct the labels, or choose a labelled split."
        )
    return replace(split, relabel=relabel)


def _stream_size(split: Split, spec: DatasetSpec, settings: DataSettings) -> int | None:
    """Count the rows of a stream: as given, as its dataset says, as registered, or by reading a folder."""
    is_train = split.name == spec.train_split
    if is_train and settings.train_num_samples is not None:
        return settings.train_num_samples
    known = (split.data.info.splits or {}).get(split.name)
    if known is not None and known.num_examples:
        return known.num_examples
    if not spec.local and settings.dataset in DATASETS:
        return spec.train_size if is_train else spec.val_size
    if spec.local:
        return sum(1 for _ in split.read(split.data.select_columns([split.target_key])))
    if not is_train:
        return None
    raise ApartError(
        f"{spec.path} does not say how many images its stream has, which sets the length of an epoch; name the number: "
        "--train-num-samples."
    )
