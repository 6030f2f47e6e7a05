"""A part of a dataset in smaller images, as a folder of parquet files: for studies on one CPU."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from apart_hf.data.images import BadImage, bad_image, rgb
from apart_hf.data.loading import DataSettings, load_image_data
from apart_hf.data.splits import Split
from apart_hf.errors import ApartError


def reduce_data(settings: DataSettings, folder: Path, *, classes: int, images: int, edge: int) -> None:
    """Write a part of a dataset to `folder`, unless it is there.

    Training images are `images` of each of the first `classes` classes, drawn by seed 0. The rest of these classes'
    training images joins the evaluation split: they are not trained on, and more images tell smaller differences.

    Args:
        settings: of the dataset.
        folder: appears whole or not at all.
        classes: how many.
        images: of each class, for training.
        edge: of the images in pixels; each pixel is the mean of the square that it covers.

    Raises: ApartError where the dataset has fewer classes, a class has too few images, or the folder cannot be made.
    """
    if folder.exists():
        return
    data = load_image_data(settings)
    names = data.class_names[:classes]
    counts = np.bincount(data.train.labels(), minlength=classes)[:classes]
    if len(names) < classes or counts.min() <= images:
        raise ApartError(
            f"{data.spec.path} has {len(data.class_names)} classes, the smallest of the first {classes} with "
            f"{counts.min()} training images; this scale needs {classes} with more than {images}. Use --scale full."
        )
    trained, rest = _drawn(data.train.labels(), classes, images)
    held_out = np.flatnonzero(data.val.labels() < classes)
    features = datasets.Features({
        data.spec.input_key: datasets.Image(), data.spec.target_key: datasets.ClassLabel(names=names),
    })
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    except OSError as error:
        raise ApartError(f"cannot write {folder}: {error.strerror}; choose another --output.") from error
    temporary.chmod(0o755)
    try:
        for name, rows in (
            (data.spec.train_split, _shrunk(data.train, trained, edge)),
            (data.spec.val_split, _shrunk(data.val, held_out, edge) + _shrunk(data.train, rest, edge)),
        ):
            columns = dict(zip(features, map(list, zip(*rows))))
            part = datasets.Dataset.from_dict(columns, features=features)
            part.to_parquet(str(temporary / f"{name}-00000-of-00001.parquet"))
        temporary.rename(folder)
    except OSError:
        if not folder.exists():  # else another process made it meanwhile, of the same images
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _drawn(labels: np.ndarray, classes: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (trained, rest) of the first classes' rows, each in order."""
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(np.flatnonzero(labels == index)) for index in range(classes)]
    trained, rest = [rows[:images] for rows in shuffled], [rows[images:] for rows in shuffled]
    return np.sort(np.concatenate(trained)), np.sort(np.concatenate(rest))


def _shrunk(split: Split, indices: np.ndarray, edge: int) -> list[tuple[Image.Image, int]]:
    found = []
    for index, (cell, label) in zip(indices.tolist(), split.cells(indices.tolist())):
        try:
            found.append((rgb(cell).resize((edge, edge), Image.Resampling.BOX), label))
        except BadImage as error:
            raise bad_image(split.place(index), error) from error
    return found
