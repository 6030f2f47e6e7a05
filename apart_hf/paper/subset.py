"""A part of a dataset in smaller images, as a folder of parquet files: for studies on one CPU."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from apart_hf.data.loading import ImageData, load_image_data
from apart_hf.data.settings import DataSettings
from apart_hf.data.splits import Split
from apart_hf.errors import ApartError

Part = tuple[Split, np.ndarray]  # positions of rows in a split


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

    Raises:
        ApartError: where the dataset has fewer classes, a class has too few images, or the folder cannot be made.
    """
    if folder.exists():
        return
    import datasets  # which a table of whole packed data does without

    data = load_image_data(settings)
    training, evaluation = _parts(data, classes, images)
    names = data.class_names[:classes]
    features = datasets.Features(
        {data.train.input_key: datasets.Image(), data.train.target_key: datasets.ClassLabel(names=names)}
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    except OSError as error:
        raise ApartError(f"cannot write {folder}: {error.strerror}; choose another --output.") from error
    temporary.chmod(0o755)
    try:
        for name, rows in ((data.train.name, _rows(training, edge)), (data.val.name, _rows(evaluation, edge))):
            columns = dict(zip(features, map(list, zip(*rows))))
            part = datasets.Dataset.from_dict(columns, features=features)
            part.to_parquet(str(temporary / f"{name}-00000-of-00001.parquet"))
        temporary.rename(folder)
    except OSError:
        if not folder.exists():  # else another process made it meanwhile, of the same images
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def evaluation_images(
    settings: DataSettings, *, classes: int, images: int, chosen: Sequence[int]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Read evaluation images of the part that `reduce_data` makes, by position in it, in the dataset's own size.

    Returns:
        (height, width, 3) uint8 each, and their class indices.

    Raises:
        ApartError: as `reduce_data` does.
    """
    _, evaluation = _parts(load_image_data(settings), classes, images)
    where = [(split, index) for split, indices in evaluation for index in indices.tolist()]
    found = _rows((split, np.array([index])) for split, index in (where[position] for position in chosen))
    return [np.asarray(image) for image, _ in found], np.array([label for _, label in found])


def _parts(data: ImageData, classes: int, images: int) -> tuple[list[Part], list[Part]]:
    """Choose the rows of the training and of the evaluation split.

    Raises:
        ApartError: where the dataset has fewer classes, or a class too few images.
    """
    counts = np.bincount(data.train.labels(), minlength=classes)[:classes]
    if len(data.class_names) < classes or counts.min() <= images:
        raise ApartError(
            f"{data.spec.path} has {len(data.class_names)} classes, the smallest of the first {classes} with "
            f"{counts.min()} training images; this scale needs {classes} with more than {images}. Use --scale full."
        )
    trained, rest = _drawn(data.train.labels(), classes, images)
    return [(data.train, trained)], [(data.val, np.flatnonzero(data.val.labels() < classes)), (data.train, rest)]


def _drawn(labels: np.ndarray, classes: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the positions (trained, rest) of the first classes' rows, each in order."""
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(np.flatnonzero(labels == index)) for index in range(classes)]
    trained, rest = [rows[:images] for rows in shuffled], [rows[images:] for rows in shuffled]
    return np.sort(np.concatenate(trained)), np.sort(np.concatenate(rest))


def _rows(parts: Iterable[Part], edge: int | None = None) -> list[tuple[Image.Image, int]]:
    """Read (image, class index) of each row; averaged to `edge` pixels, or in its own size."""
    found = []
    for split, positions in parts:
        for _, image, label in split.images(positions.tolist()):
            found.append((image if edge is None else image.resize((edge, edge), Image.Resampling.BOX), label))
    return found
