"""The most confident mistakes of an evaluation, on one sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from apart_hf.utils.plotting import plain, save, shortened

COLUMNS = 5
LETTERS = 24  # of a line below an image
_WIDTH, _GAP, _TEXT = 1.7, 0.15, 0.62  # inches of an image, between two, and of what stands below


def pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return the image that a network was given, (H, W, 3) in [0, 1], grey where it has one channel."""
    scaled = image.float().permute(1, 2, 0).numpy() * np.array(std) + np.array(mean)
    return np.broadcast_to(scaled.clip(0, 1), (*scaled.shape[:2], 3))


def caption(row: dict[str, Any]) -> str:
    """Write the lines below an image: class, predicted class and its probability, and the image's name where known.

    Args:
        row: of errors.json.
    """
    name = Path(row["file"]).name if row.get("file") else f"image {row['index']}" if "index" in row else ""
    predicted = shortened(row["predicted"], LETTERS - 7)
    return "\n".join(
        [shortened(row["class"], LETTERS), f"→ {predicted} {100 * row['confidence']:.0f} %", shortened(name, LETTERS)]
    )


def plot_mistakes(images: list[np.ndarray], captions: list[str], path: Path, title: str) -> None:
    """Draw images with what is said of each below it, as PNG.

    Args:
        images: one or more of one size, see `pixels`.
        captions: of each, in three lines.
        path: the file to write.
        title: of the figure.
    """
    columns = min(COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    tall, wide = images[0].shape[:2]
    height = _WIDTH * tall / wide
    width, total = columns * (_WIDTH + _GAP) - _GAP, rows * (height + _TEXT)
    figure = Figure(figsize=(width, total))
    axes = figure.add_axes((0, 0, 1, 1))  # one for all, in inches: axes take longer to draw than images
    axes.axis("off")
    axes.set_title(plain(title), loc="left", fontsize=11)
    for number, (image, text) in enumerate(zip(images, captions)):
        left, top = number % columns * (_WIDTH + _GAP), number // columns * (height + _TEXT)
        place = left, left + _WIDTH, top + height, top
        axes.imshow(image, extent=place, interpolation="nearest", aspect="auto", origin="upper")
        axes.text(left + _WIDTH / 2, top + height + 0.04, text, ha="center", va="top", fontsize=8)
    axes.set(xlim=(0, width), ylim=(total, 0))
    save(figure, path, bbox_inches="tight")
