"""One split of a dataset, whole, in part, or as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset, Image, IterableDataset

from apart_hf.data.decoding import BadImage, bad_image, rgb
from apart_hf.errors import ApartError, OneProcessError, first_line


@dataclass(frozen=True)
class Split:
    """Gives rows of (encoded image, class index).

    Args:
        data: with at least these two columns; images are left encoded.
        name: of the split that the rows are from.
        input_key, target_key: the columns.
        size: rows; None: a stream of unknown length.
        rows: (size,) positions in the split; None: all of them, in order.
        relabel: class index by the data's own one; None: they are the same.
    """

    data: Dataset | IterableDataset
    name: str
    input_key: str
    target_key: str
    size: int | None
    rows: np.ndarray | None = None
    relabel: np.ndarray | None = None

    @classmethod
    def of(
        cls, data: Dataset | IterableDataset, name: str, input_key: str, target_key: str, size: int | None = None
    ) -> Split:
        """Take the two columns of `data`; `size` is that of a stream."""
        columns = data.select_columns([input_key, target_key]).cast_column(input_key, Image(decode=False))
        return cls(columns, name, input_key, target_key, size if isinstance(data, IterableDataset) else len(data))

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError(f"the length of split {self.name!r} is not known")
        return self.size

    @property
    def streamed(self) -> bool:
        return isinstance(self.data, IterableDataset)

    def place(self, index: int) -> str:
        """Say where an image is, for messages."""
        return f"image {index if self.rows is None else self.rows[index]} of split {self.name!r}"

    def labels(self) -> np.ndarray:
        """Return the class indices (size,); not of a stream. No image is read.

        Raises:
            ApartError: where one is missing.
        """
        column = self.data.select_columns([self.target_key]).with_format("arrow")[:][self.target_key]
        if column.null_count:
            first = column.is_null().to_numpy().argmax()
            raise ApartError(f"split {self.name!r}: {column.null_count} labels are missing, the first at {first}.")
        found = column.to_numpy().astype(np.int64)
        return found if self.relabel is None else self.relabel[found]

    def cells(self, indices: list[int]) -> list[tuple[dict[str, Any] | None, int]]:
        """Return (encoded image, class index) of rows, by one fast look-up for all; not of a stream."""
        rows = self.data[indices]
        labels = rows[self.target_key]
        return list(zip(rows[self.input_key], labels if self.relabel is None else self.relabel[labels].tolist()))

    def read(self, order: IterableDataset | None = None) -> Iterator[dict[str, Any]]:
        """Read the rows of a stream, in the order of another stream of the same rows, or in their own.

        Raises:
            OneProcessError: where files are damaged or out of reach.
        """
        rows = 0
        try:
            for row in self.data if order is None else order:
                yield row
                rows += 1
        # pyarrow's, of damaged files, are of all three kinds; what a lost Hub ends in is an OSError
        except (OSError, ValueError, NotImplementedError) as error:
            raise OneProcessError(
                f"split {self.name!r}: the stream cannot be read on after {rows} rows ({first_line(error)}); replace "
                "damaged files, and check the connection where it comes from the Hub."
            ) from error

    def part(self, indices: np.ndarray) -> Split:
        """Return these rows alone."""
        rows = indices if self.rows is None else self.rows[indices]
        return replace(self, data=self.data.select(indices), size=len(indices), rows=rows)

    def image_size(self, skip_bad: bool) -> tuple[int, int]:
        """Return (width, height) in pixels of the first image that can be decoded.

        Raises:
            ApartError: where that is not the first one, unless `skip_bad`.
        """
        cells = self.read() if self.streamed else (self.data[i] for i in range(len(self)))
        for index, cell in enumerate(cells):
            try:
                return rgb(cell[self.input_key]).size
            except BadImage as error:
                if not skip_bad:
                    raise bad_image(self.place(index), error) from error
        raise ApartError(f"no image of split {self.name!r} can be decoded.")


def stratified(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a share of every class by `seed`: positions (rest, part), each in order.

    The part has round(fraction * all) rows; classes whose share is no whole number are rounded so that this holds.

    Raises:
        ApartError: where a class has no row in one of the two.
    """
    classes, counts = np.unique(labels, return_counts=True)  # in order
    shares = fraction * counts
    taken = np.floor(shares).astype(int)
    missing = round(fraction * len(labels)) - int(taken.sum())
    taken[np.argsort(taken - shares, kind="stable")[:missing]] += 1
    empty = np.flatnonzero((taken == 0) | (taken == counts))
    if len(empty):
        first = empty[0]
        raise ApartError(
            f"--val-fraction {fraction}: class {classes[first]} has {counts[first]} images, of which {taken[first]} "
            "would be for validation; training and validation need one of every class, take another fraction."
        )
    rng = np.random.default_rng(seed)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    is_drawn = np.zeros(len(labels), dtype=bool)
    for rows, count in zip(by_class, taken):
        is_drawn[rng.permutation(rows)[:count]] = True
    return np.flatnonzero(~is_drawn), np.flatnonzero(is_drawn)
