"""Common corruptions of images (Hendrycks and Dietterich, ICLR 2019), drawn by a seed of their own for every image."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from apart_hf.errors import ApartError

SMALLEST = 32  # pixels: the package's own bound


@dataclass(frozen=True)
class CorruptedImages:
    """Holds the same images under each corruption and severity.

    Args:
        names: of the corruptions.
        severities: 1 (mild) to 5.
        images: (names, severities, N, edge, edge, 3) uint8, RGB.
        labels: (N,) class indices.
    """

    names: tuple[str, ...]
    severities: tuple[int, ...]
    images: np.ndarray
    labels: np.ndarray

    @property
    def digest(self) -> str:
        """Hash all pixels and labels."""
        found = hashlib.sha256(np.ascontiguousarray(self.images).data)
        found.update(self.labels.astype("<i8").tobytes())
        return found.hexdigest()[:16]

    def __iter__(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """Give (name, severity, images (N, edge, edge, 3)) of each."""
        for name, of_name in zip(self.names, self.images):
            for severity, images in zip(self.severities, of_name):
                yield name, severity, images

    def save(self, path: Path) -> None:
        """Write an npz file, which appears whole or not at all."""
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".npz", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(
                    file,
                    names=np.array(self.names),
                    severities=np.array(self.severities),
                    images=self.images,
                    labels=self.labels,
                )
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: Path) -> CorruptedImages:
        """Read what `save` wrote.

        Raises:
            ApartError: where it cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as found:
                return cls(
                    tuple(found["names"].tolist()),
                    tuple(found["severities"].tolist()),
                    found["images"],
                    found["labels"],
                )
        except (OSError, ValueError, KeyError) as error:
            raise ApartError(f"{path} cannot be read ({error}); remove it, and it is made anew.") from error


def check_installed() -> None:
    """Raise ApartError where the package that corrupts images is missing."""
    if importlib.util.find_spec("imagecorruptions") is None:
        raise ApartError('corruptions need a package that is not installed: pip install "apart-hf[corruptions]".')


def corruption_names(*, common: bool = True) -> list[str]:
    """List the 15 common corruptions, or those and the four that are kept for validation."""
    check_installed()
    from imagecorruptions import get_corruption_names

    return list(get_corruption_names("common" if common else "all"))


def corruption_number(name: str) -> int:
    """Return the number of a corruption, by which its random numbers are its own."""
    return corruption_names(common=False).index(name)


def corrupt_images(
    images: Sequence[np.ndarray], labels: np.ndarray, *, severities: Sequence[int], edge: int | None = None
) -> CorruptedImages:
    """Corrupt images by each of the 15 common corruptions.

    What is drawn for an image depends on its position, the corruption and the severity alone, and not on numpy's or
    numba's global random numbers, which stay as they are.

    Args:
        images: (height, width, 3) uint8 each, all of one size, of at least 32 pixels.
        labels: (N,) class indices.
        severities: of 1 to 5.
        edge: width and height in pixels to which the corrupted images are averaged; None: they keep their size.

    Raises:
        ApartError: where an image is smaller than 32 pixels, or the package is not installed.
    """
    names = tuple(corruption_names())
    for index, image in enumerate(images):
        if min(image.shape[:2]) < SMALLEST:
            height, width = image.shape[:2]
            raise ApartError(
                f"image {index} has {width}x{height} pixels; corruptions need at least {SMALLEST}x{SMALLEST}."
            )
    found = [
        [
            [
                _averaged(corrupt(image, name, severity, seed=(index, number, severity)), edge)
                for index, image in enumerate(images)
            ]
            for severity in severities
        ]
        for number, name in enumerate(names)
    ]
    return CorruptedImages(names, tuple(severities), np.array(found, dtype=np.uint8), np.asarray(labels))


def corrupt(image: np.ndarray, name: str, severity: int, *, seed: Sequence[int]) -> np.ndarray:
    """Corrupt one image (height, width, 3) uint8; the same seed gives the same."""
    from imagecorruptions import corrupt
    from imagecorruptions.corruptions import __dict__ as functions

    number = int(np.random.SeedSequence(seed).generate_state(1)[0])
    # impulse noise and glass blur draw from generators of their own
    own = {"seed": number} if "seed" in inspect.signature(functions[name]).parameters else {}
    before = np.random.get_state()
    np.random.seed(number)
    try:
        return corrupt(image, severity, corruption_name=name, **own)
    finally:
        np.random.set_state(before)


def _averaged(image: np.ndarray, edge: int | None) -> np.ndarray:
    return image if edge is None else np.asarray(Image.fromarray(image).resize((edge, edge), Image.Resampling.BOX))
