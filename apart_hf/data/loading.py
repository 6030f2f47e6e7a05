"""From a dataset name or a folder to splits of (image, class index), checked before training starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from apart_hf.data.access import find_columns, load_tables, open_data
from apart_hf.data.image_sizes import ImageSizes
from apart_hf.data.labels import check_labels, compare_classes, counts_from_one, find_class_names, relabelling
from apart_hf.data.registry import DATASETS, DatasetSpec, find_dataset
from apart_hf.data.settings import DataSettings
from apart_hf.data.split_names import TRAIN_NAMES, VAL_NAMES, pick_split
from apart_hf.data.splits import Split, stratified
from apart_hf.errors import ApartError

if TYPE_CHECKING:
    from datasets import Dataset

    from apart_hf.data.packed import PackedTable
    from apart_hf.data.sources import Source


@dataclass(frozen=True)
class ImageData:
    """Holds the splits of an image classification dataset.

    Args:
        train: what is trained on.
        val: what is evaluated after every epoch, and picks the best one.
        spec: with every name resolved.
        class_names: by class index.
        image_size: (width, height) in pixels of training images, or what is taken for it where they differ.
        test: what is looked at once, at the end, where `val` is a part of the training split.
        notes: what was left out or is unlike what one may expect, in words.
        timm: in what timm's own reader of image folders sees other classes; None: it sees the same.
        labels_from: what tells the labels of image files; None: the column of a table.
        sizes: of the training images that were looked at; None: all have `image_size`.
    """

    train: Split
    val: Split
    spec: DatasetSpec
    class_names: list[str]
    image_size: tuple[int, int]
    test: Split | None = field(default=None)
    notes: tuple[str, ...] = ()
    timm: str | None = None
    labels_from: str | None = None
    sizes: ImageSizes | None = None

    @property
    def held_out(self) -> Split:
        """Return the split that final results are of."""
        return self.val if self.test is None else self.test


def load_image_data(settings: DataSettings | None = None) -> ImageData:
    """Load a registered dataset, a Hub id, or a folder (images, parquet files, tar shards, save_to_disk, or packed).

    A registered name beside a folder lends it splits, columns, normalisation and transform, as far as the folder has
    them. What is not named is found: see docs/DATA.md for the names of splits and columns, and for the order of
    classes.

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
    asked = (settings.train_split, settings.val_split)
    source = open_data(spec, settings.streaming, [name for name in asked if name is not None], settings.only)
    train_name, val_name = _choose(source, spec, settings)
    chosen = [train_name] if val_name in (None, train_name) else [train_name, val_name]
    loaded = load_tables(source, spec, chosen)
    if spec.local:
        spec = _only_what_is_there(spec, loaded, settings.named)
    columns = find_columns(loaded[train_name], spec)
    spec = replace(spec, train_split=train_name, val_split=val_name, input_key=columns[0], target_key=columns[1])
    splits = [_split(loaded[name], name, columns, spec, settings.streaming) for name in chosen]
    from_one = counts_from_one(splits, settings)
    names = find_class_names(splits, spec, settings, from_one)
    _check_number(names, spec, settings)
    splits = [_checked(split, spec, names, settings, from_one) for split in splits]
    train, val, test = splits[0], splits[-1], None
    notes = [*source.notes]
    if settings.val_fraction is not None:
        if val_name == train_name:
            raise ApartError(f"--val-fraction: {train_name!r} is both --train-split and --val-split; drop one.")
        test = None if val_name is None else val
        rest, part = stratified(train.labels(), settings.val_fraction, settings.seed)
        train, val = train.part(rest), train.part(part)
    if len(splits) == 2 and all(split.rows_known for split in splits):
        notes += compare_classes(splits[0], splits[1], names)
    sizes = train.image_sizes(settings.skip_bad)
    return ImageData(
        train,
        val,
        spec,
        names,
        sizes.decided,
        test,
        tuple(notes),
        timm=source.timm,
        labels_from=source.labels_from,
        sizes=sizes,
    )


def _choose(source: Source, spec: DatasetSpec, settings: DataSettings) -> tuple[str, str | None]:
    """Choose the splits to train and to evaluate on; the second is None where a part of the first is."""
    splits = source.splits
    named = [
        name if name in splits or not spec.local or name in settings.named.values() else None
        for name in (spec.train_split, spec.val_split)
    ]
    if settings.only is not None:
        is_train = settings.only == "train"
        usual = TRAIN_NAMES if is_train else VAL_NAMES
        given, flag = named[0 if is_train else 1], f"--{settings.only}-split"
        if given is None and len(splits) == 1:
            return splits[0], splits[0]
        name = pick_split(splits, given, usual, flag, seen=source.seen)
        return name, name
    train_name = pick_split(splits, named[0], TRAIN_NAMES, "--train-split", seen=source.seen)
    if settings.val_fraction is None or named[1] is not None or any(name.lower() in VAL_NAMES for name in splits):
        more = ", or keep a part of the training split: --val-fraction 0.1"
        return train_name, pick_split(splits, named[1], VAL_NAMES, "--val-split", more, source.seen)
    return train_name, None


def _check_number(names: list[str], spec: DatasetSpec, settings: DataSettings) -> None:
    if settings.num_classes is not None and settings.num_classes != len(names):
        if settings.only is not None:
            raise ApartError(
                f"the model has {settings.num_classes} classes without names, and {spec.path} has {len(names)}; name "
                "data with all its classes, in the order of its outputs."
            )
        raise ApartError(
            f"--num-classes {settings.num_classes}, but {spec.path} has {len(names)} classes; leave the flag out."
        )
    if len(names) == 1 and settings.only is None:
        raise ApartError(
            f"{spec.path} has one class, {names[0]!r}, of which any network is always right; name data of two or more."
        )


def _as_named(spec: DatasetSpec, given: dict[str, str]) -> DatasetSpec:
    """Put in the splits and columns that the user names."""
    return replace(
        spec,
        train_split=given.get("train_split", spec.train_split),
        val_split=given.get("val_split", spec.val_split),
        input_key=given.get("input_key", spec.input_key),
        target_key=given.get("target_key", spec.target_key),
    )


def _only_what_is_there(
    spec: DatasetSpec, splits: Mapping[str, Dataset | PackedTable], given: dict[str, str]
) -> DatasetSpec:
    """Drop the registered columns that a folder does not use, so that its own are found."""
    columns = {key for data in splits.values() for key in data.features}
    there = replace(
        spec,
        input_key=spec.input_key if spec.input_key in columns else None,
        target_key=spec.target_key if spec.target_key in columns else None,
    )
    return _as_named(there, given)


def _split(
    data: Dataset | PackedTable, name: str, columns: tuple[str, str], spec: DatasetSpec, streamed: bool
) -> Split:
    for key, flag in zip(columns, ("--input-key", "--target-key")):
        if key not in data.features:
            raise ApartError(f"split {name!r} has no column {key!r}, only {', '.join(data.features)}; see {flag}.")
    split = Split.of(data, name, *columns, streamed=streamed)
    if split.rows_known and not len(split):
        raise ApartError(f"split {name!r} of {spec.path} is empty.")
    return split


def _checked(split: Split, spec: DatasetSpec, names: list[str], settings: DataSettings, from_one: bool) -> Split:
    """Check the labels of a split and put them in the order of `names`."""
    flexible = (settings.class_map or settings.class_names or settings.class_order) is not None
    relabel = relabelling(split, names, from_one, flexible, str(spec.train_split))
    split = replace(split, relabel=relabel)
    if not split.rows_known:
        return replace(split, size=_stream_size(split, spec, settings))
    check_labels(split, len(names))
    if settings.train_num_samples is not None and _is_train(split, spec, settings):
        return replace(split, size=settings.train_num_samples)
    return split


def _is_train(split: Split, spec: DatasetSpec, settings: DataSettings) -> bool:
    return settings.only is None and split.name == spec.train_split


def _stream_size(split: Split, spec: DatasetSpec, settings: DataSettings) -> int | None:
    """Count the rows of a stream: as given, as its dataset says, as registered, or by reading a folder."""
    is_train = _is_train(split, spec, settings)
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
