"""Image files for tests, whole and damaged, and datasets of them."""

from __future__ import annotations

import io

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PIL

BAD = (5, 17)  # positions in both splits


def png(seed=0, size=(16, 16)):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(1, 256, (*size, 3), dtype=np.uint8)
    PIL.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def damaged(kind):
    return {
        "truncated": png()[:200],
        "text": b"no image at all",
        "empty": b"",
        "none": None,
        "checksum": png()[:60] + b"\0\0\0\0" + png()[64:],
    }[kind]


def write_bad(folder, kinds=("truncated", "text"), rows=24):
    for split in ("train", "test"):
        content = [png(i) for i in range(rows)]
        for position, kind in zip(BAD, kinds):
            content[position] = damaged(kind)
        cells = [None if c is None else {"bytes": c, "path": None} for c in content]
        features = Features({"image": Image(), "label": ClassLabel(num_classes=rows)})
        Dataset.from_dict({"image": cells, "label": list(range(rows))}, features=features).to_parquet(
            str(folder / f"{split}.parquet")
        )
    return str(folder)


def images(count, size=(20, 16), mode="RGB"):
    """Noise, the same at every call."""
    rng = np.random.default_rng(0)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return [PIL.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).convert(mode) for _ in range(count)]


def labelled(count=6, names=("cat", "dog"), label="label", labels=None, column="image"):
    """Rows of images and labels; without names these are whole numbers."""
    values = labels if labels is not None else [i % len(names) for i in range(count)]
    kind = ClassLabel(names=list(names)) if names else Value("int64")
    return Dataset.from_dict({column: images(count), label: values}, features=Features({column: Image(), label: kind}))


def write_images(root, *paths, size=(8, 8)):
    """Image files at these paths below `root`, each of one grey of its own; of a folder "a/" two images."""
    for number, path in enumerate(paths):
        for name in [f"{path}{i}.png" for i in range(2)] if path.endswith("/") else [path]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            PIL.new("RGB", size, (number, len(name), 0)).save(root / name)
    return str(root)


def write_classes(root, *splits, classes=("a", "b"), count=2):
    """Class folders of `count` images in each of these splits."""
    return write_images(
        root, *(f"{split}/{name}/{i}.png" for split in splits for name in classes for i in range(count))
    )
