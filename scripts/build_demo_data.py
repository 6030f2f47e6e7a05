"""Rebuild the bundled demo data from the full Fashion-MNIST set.

    apt-get install dataset-fashion-mnist
    python scripts/build_demo_data.py

takes, of each class, 600 of the 6,000 training images and 100 of the 1,000 test images, drawn with a fixed seed, and
writes them as PNG into apart_hf/data/demo/{train,test}.parquet with the columns image and label.

    python scripts/build_demo_data.py --per-class 6000 1000 --output FOLDER

writes all images instead, so that `apart-hf train --dataset fashion-mnist --data-dir FOLDER` needs no network.
"""

from __future__ import annotations

import argparse
import gzip
import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
FEATURES = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
SPLITS = {"train": "train", "test": "t10k"}  # split -> prefix of the files


def read_idx(path: Path) -> np.ndarray:
    """An array from MNIST's IDX format: two zero bytes, type (8 = unsigned byte), rank, big-endian sizes, values."""
    with gzip.open(path) as file:
        raw = file.read()
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def subset(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of `per_class` images of each class, shuffled."""
    drawn = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(len(CLASSES))]
    return rng.permutation(np.concatenate(drawn))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default="/usr/share/datasets/fashion-mnist", help="folder of .gz files")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "apart_hf/data/demo")
    parser.add_argument(
        "--per-class", type=int, nargs=2, default=[600, 100], metavar=("TRAIN", "TEST"), help="images of each class"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for (split, prefix), per_class in zip(SPLITS.items(), args.per_class):
        images = read_idx(args.source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(args.source / f"{prefix}-labels-idx1-ubyte.gz")
        rows = subset(labels, per_class, rng)
        columns = {
            "image": [{"bytes": png(images[i]), "path": None} for i in rows],
            "label": [int(labels[i]) for i in rows],
        }
        target = args.output / f"{split}.parquet"
        Dataset.from_dict(columns, features=FEATURES).to_parquet(target)
        print(f"{target}: {len(rows)} images, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
