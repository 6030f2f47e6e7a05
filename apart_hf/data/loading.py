"""From a dataset name or a folder to splits of (image, class index), checked before training starts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image

from apart_hf.data.registry import DATASETS, DatasetSpec, find_dataset
from apart_hf.data.sources import open_splits
from apart_hf.data.splits import Split, stratified
from apart_hf.errors import ApartError

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("validation", "valid", "val", "eval", "test")


@dataclass(frozen=True)
class DataSettings:
    """What to load, and which part of it for what.

    Args:
        dataset: a registered name or a Hub id.
        dataset_config: the Hub dataset's configuration; None: the registered one, or the only one.
        data_dir: a folder instead.
        train_split, val_split, input_key, target_key: names; None: found, see `load_image_data`.
        num_classes: to be checked against the data.
        class_map: file of class names, one a line, in the order of the class indices.
        val_fraction: share of the training split that is kept for validation; None: `val_split` is.
        seed: of that share.
        streaming: read images as they come.
        train_num_samples: images in the training split, of a stream that does not tell.
        skip_bad: images that cannot be decoded are no error.
        class_names: what `class_map` holds, where it is in no file.
    """

    dataset: str = "demo"
    dataset_config: str | None = None
    data_dir: str | None = None
    train_split: str | None = None
    val_split: str | None = None
    input_key: str | None = None
    target_key: str | None = None
    num_classes: int | None = None
    class_map: str | None = None
    val_fraction: float | None = None
    seed: int = 0
    streaming: bool = False
    train_num_samples: int | None = None
    skip_bad: bool = False
    class_names: tuple[str, ...] | None = None

    @property
    def named(self) -> dict[str, str]:
        """Names that were given."""
        names = {key: getattr(self, key) for key in ("train_split", "val_split", "input_key", "target_key")}
        return {key: name for key, name in names.items() if name is not None}


@dataclass(frozen=True)
class ImageData:
    """The splits of an image classification dataset.

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
        """The split that final results are of."""
        return self.val if self.test is None else self.test


def load_image_data(settings: DataSettings = DataSettings()) -> ImageData:
    """Load a registered dataset, a Hub id, or a folder (parquet files, image folders, or save_to_disk).

    A registered name beside a folder lends it splits, columns, normalisation and transform, as far as the folder has
    them. Splits and columns that are not named are found: the split called train, the one called validation, valid, val
    or test, the first Image column and the first ClassLabel (else integer `label`) column.

    Raises: ApartError naming what exists where something does not, and the first bad label.
    """
    spec = replace(find_dataset(settings.dataset, settings.data_dir), **settings.named)
    if settings.dataset_config is not None:
        if spec.local:
            raise ApartError(f"--dataset-config {settings.dataset_config}: {spec.path} is a folder; leave it out.")
        spec = replace(spec, config=settings.dataset_config)
    splits = open_splits(spec, settings.streaming)
    if spec.local:
        spec = _only_what_is_there(spec, splits, settings.named)
    spec = replace(spec, train_split=_pick_split(splits, spec.train_split, TRAIN_NAMES, "--train-split"))
    if settings.val_fraction is None or spec.val_split is not None or set(VAL_NAMES) & set(splits):
        spec = replace(spec, val_split=_pick_split(splits, spec.val_split, VAL_NAMES, "--val-split"))
    data = splits[spec.train_split]
    spec = replace(spec, input_key=_input_key(data, spec), target_key=_target_key(data, spec))
    names = _class_names(data, spec, settings)
    if settings.num_classes is not None and settings.num_classes != len(names):
        raise ApartError(
            f"--num-classes {settings.num_classes}, but {spec.path} has {len(names)} classes; leave the flag out."
        )
    parts = {
        name: _checked(splits[name], name, spec, names, settings)
        for name in dict.fromkeys((spec.train_split, spec.val_split)) if name is not None
    }
    train, held_out = parts[spec.train_split], parts.get(spec.val_split)
    val, test = held_out, None
    if settings.val_fraction is not None:
        if spec.val_split == spec.train_split:
            raise ApartError(f"--val-fraction: {spec.train_split!r} is both --train-split and --val-split; drop one.")
        rest, part = stratified(train.labels(), settings.val_fraction, settings.seed)
        train, val, test = train.part(rest), train.part(part), held_out
    return ImageData(train, val, spec, names, train.image_size(settings.skip_bad), test)


def _only_what_is_there(spec: DatasetSpec, splits: DatasetDict, given: dict[str, str]) -> DatasetSpec:
    """Without the registered names that a folder does not use, so that its own are found; `given` names stay."""
    columns = {key for data in splits.values() for key in data.features}
    there = {"train_split": splits, "val_split": splits, "input_key": columns, "target_key": columns}
    return replace(spec, **{
        key: None for key, names in there.items() if key not in given and getattr(spec, key) not in names
    })


def _pick_split(splits: DatasetDict, named: str | None, usual: tuple[str, ...], flag: str) -> str:
    candidates = [named] if named is not None else usual
    for name in candidates:
        if name in splits:
            return name
    wanted = f"no split {named!r}" if named is not None else f"no split called {' or '.join(usual)}"
    part = ", or keep a part of the training split: --val-fraction 0.1" if flag == "--val-split" else ""
    raise ApartError(f"{wanted}: the splits are {', '.join(splits)}; name one with {flag}{part}.")


def _column(data: Dataset, named: str | None, flag: str, kind: str, found: list[str], fit: list[str], make: str) -> str:
    """The column that is named, or else the first that is found.

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


def _type_name(feature) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def _input_key(data: Dataset, spec: DatasetSpec) -> str:
    images = [key for key, feature in data.features.items() if isinstance(feature, Image)]
    return _column(data, spec.input_key, "--input-key", "image", images, images,
                   "make one of files or their bytes by datasets' cast_column(NAME, datasets.Image())")


def _target_key(data: Dataset, spec: DatasetSpec) -> str:
    labels = [key for key, feature in data.features.items() if isinstance(feature, ClassLabel)]
    integers = [key for key, feature in data.features.items() if "int" in _type_name(feature)]
    return _column(data, spec.target_key, "--target-key", "class label",
                   labels + [key for key in integers if "label" in key], labels + integers,
                   "make one of text or other values by datasets' class_encode_column(NAME)")


def _class_names(data: Dataset, spec: DatasetSpec, settings: DataSettings) -> list[str]:
    """By class index: of --class-map, of the data, or else the numbers up to the largest label."""
    feature, expected = data.features[spec.target_key], None if spec.local else spec.num_classes
    found = list(feature.names) if isinstance(feature, ClassLabel) else None
    if settings.class_map is not None or settings.class_names is not None:
        where = "the model" if settings.class_map is None else f"--class-map {settings.class_map}"
        names = list(settings.class_names) if settings.class_map is None else _read_class_map(settings.class_map)
        if found is not None and (strange := sorted(set(found) ^ set(names))):
            raise ApartError(
                f"{where}: {len(strange)} class names are not in both it and the data, the first is {strange[0]!r}; it "
                "needs every class of the data once."
            )
        return names
    if found is None and settings.streaming:
        count = settings.num_classes or spec.num_classes
        if count is None:
            raise ApartError(f"{spec.path} names no classes, and a stream is not counted: give --num-classes.")
        found = [str(i) for i in range(count)]
    elif found is None:
        labels = Split.of(data, spec.train_split, spec.input_key, spec.target_key).labels()
        largest = int(np.max(labels, initial=-1))
        if settings.num_classes is None and largest >= max(len(labels), 1):
            raise ApartError(
                f"split {spec.train_split!r}: label {largest} at index {labels.argmax()} would make {largest + 1} "
                f"classes of {len(labels)} images; correct it, or name the number of classes by --num-classes."
            )
        found = [str(i) for i in range(settings.num_classes or max(largest + 1, expected or 0))]
    if expected not in (None, len(found)):
        raise ApartError(f"{spec.path} should have {expected} classes, but has {len(found)}; is it another dataset?")
    return found


def _read_class_map(path: str) -> list[str]:
    try:
        names = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ApartError(f"--class-map {path}: cannot be read ({reason}).") from error
    if not names or len(set(names)) < len(names):
        raise ApartError(f"--class-map {path}: needs class names, one a line, each once.")
    return names


def _checked(data: Dataset, name: str, spec: DatasetSpec, names: list[str], settings: DataSettings) -> Split:
    """The split with its labels in the order of `names`."""
    for key, flag in ((spec.input_key, "--input-key"), (spec.target_key, "--target-key")):
        if key not in data.features:
            raise ApartError(f"split {name!r} has no column {key!r}, only {', '.join(data.features)}; see {flag}.")
    feature, relabel = data.features[spec.target_key], None
    own = list(feature.names) if isinstance(feature, ClassLabel) else names
    if own != names:
        if (settings.class_map or settings.class_names) is None or set(own) != set(names):
            raise ApartError(
                f"split {name!r} has {len(own)} classes and split {spec.train_split!r} {len(names)}, or in "
                "another order; both splits need the same classes in the same order."
            )
        relabel = np.array([names.index(one) for one in own])
    split = Split.of(data, name, spec.input_key, spec.target_key)
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
    """Rows of a stream: as given, as its dataset says, as registered, or counted in a folder."""
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
