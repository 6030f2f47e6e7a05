#!/usr/bin/env python
"""Images a second from both loaders, interleaved in one process, medians.

    python scripts/loader_speed.py --size 32 --images 20000

Random PNG images (JPEG from 97 pixels on) through scripts/train.py's own loaders: batches of 128, augmentation on. Also
the time that decoding everything into memory takes.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PIL

from apart_hf.data import DatasetSpec, ImageData, Loaders, LoaderSettings, Split
from apart_hf.data.transforms import SMALL, data_config

IMAGENET = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}


def make_images(count: int, width: int, height: int) -> Dataset:
    """Photograph-like content: smooth noise, so that the files have usual sizes."""
    rng, files = np.random.default_rng(0), []
    for _ in range(min(count, 256)):
        coarse = PIL.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height), PIL.BICUBIC)
        noisy = np.clip(np.asarray(coarse) + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        PIL.fromarray(noisy).save(file, "JPEG" if width > SMALL else "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    rows = {"image": [files[i % len(files)] for i in range(count)], "label": [i % 10 for i in range(count)]}
    return Dataset.from_dict(rows, features=Features({"image": Image(), "label": ClassLabel(num_classes=10)}))


def rate(batches: Callable, limit: float) -> float:
    """Images a second over at most `limit` seconds."""
    start, seen = time.perf_counter(), 0
    for images, _ in batches():
        seen += len(images)
        if time.perf_counter() - start > limit:
            break
    return seen / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32, help="edge in pixels that the network sees")
    parser.add_argument("--source", type=int, nargs=2, help="width and height of the files [SIZE; from 97: 500 375]")
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--workers", type=int, default=0, help="processes of the per-image loader")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the main process")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    width, height = args.source or ((args.size,) * 2 if args.size <= SMALL else (500, 375))
    images = make_images(args.images, width, height)
    spec = DatasetSpec("random", train_split="train", val_split="val", input_key="image", target_key="label")
    train, val = (
        Split.of(part, name, "image", "label") for part, name in ((images, "train"), (images.select(range(128)), "val"))
    )
    data = ImageData(train, val, spec, [str(i) for i in range(10)], (width, height))
    kinds = {}
    in_memory = args.size <= SMALL and (width, height) == (args.size, args.size)
    for loader in ("memory", "workers") if in_memory else ("workers",):
        images_as = data_config(IMAGENET, (width, height), img_size=args.size)
        settings = LoaderSettings(images_as, 128, 128, loader, args.workers)
        start = time.perf_counter()
        train = Loaders(data, settings, Accelerator(cpu=True)).train()
        if loader == "memory":
            print(f"decoding {args.images} images: {time.perf_counter() - start:.1f} s")
        kinds[loader] = lambda train=train: train
    rates = {loader: [] for loader in kinds}
    for _ in range(args.repeats):
        for loader, batches in kinds.items():
            rates[loader].append(rate(batches, 3.0))
    print(f"files of {width}x{height}, input {args.size}, {args.threads} thread(s), {args.workers} worker(s)")
    print("| loader | images/s: min - median - max |\n|---|---|")
    for loader, found in rates.items():
        print(f"| {loader} | {min(found):,.0f} - {statistics.median(found):,.0f} - {max(found):,.0f} |")


if __name__ == "__main__":
    main()
