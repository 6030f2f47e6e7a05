"""One split of a dataset, whole, in part, or as a stream."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as PIL

from apart_hf.data.decoding import BadImage, bad_image, rgb, upright_size
from apart_hf.data.image_sizes import LOOKED_AT, ImageSizes
from apart_hf.data.packed import PackedTable
from apart_hf.errors import ApartError, OneProcessError, first_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_AT_ONCE = 32  # rows of a table that are held while they are read
_SEARCH_SECONDS = 10


@dataclass(frozen=True)
class Split:
    """Gives rows of (encoded image, class index).

    Args:
        data: a dataset, a stream or a packed table with at least these two columns; images are left encoded.
        name: of the split that the rows are from.
        input_key, target_key: the columns.
        size: rows, or of a stream, images that an epoch counts; None: a stream of unknown length.
        rows: (size,) positions in the split; None: all of them, in order.
        relabel: class index by the data's own one; None: they are the same.
        streamed: it is read as a stream. Where `data` is a table even so, as of a folder of images, its rows are known
            and can be read in any order.
    """

    data: Any
    name: str
    input_key: str
    target_key: str
    size: int | None
    rows: np.ndarray | None = None
    relabel: np.ndarray | None = None
    streamed: bool = False

    @classmethod
    def of(
        cls,
        data: Dataset | IterableDataset | PackedTable,
        name: str,
        input_key: str,
        target_key: str,
        size: int | None = None,
        streamed: bool = False,
    ) -> Split:
        """Take the two columns of `data`; `size` is that of a stream, and `streamed` says that a table is one."""
        if isinstance(data, PackedTable):
            return cls(data, name, input_key, target_key, len(data), streamed=streamed)
        from datasets import Image, IterableDataset

        columns = data.select_columns([input_key, target_key]).cast_column(input_key, Image(decode=False))
        is_stream = isinstance(data, IterableDataset)
        size = size if is_stream else len(data)
        return cls(columns, name, input_key, target_key, size, streamed=streamed or is_stream)

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError(f"the length of split {self.name!r} is not known")
        return self.size

    @property
    def rows_known(self) -> bool:
        """Tell whether any row can be read, and labels without images; not so of a true stream."""
        if isinstance(self.data, PackedTable):
            return True
        from datasets import IterableDataset

        return not isinstance(self.data, IterableDataset)

    @property
    def parts(self) -> int:
        """Return into how many parts the split can be shared out to processes and their loader processes."""
        return len(self.data) if self.rows_known else self.data.num_shards

    def place(self, index: int, encoded: dict[str, Any] | None = None, key: str | None = None) -> str:
        """Say where an image is, for messages.

        Args:
            index: its position.
            encoded: what is there, of a stream.
            key: of the column that is meant; None: that of the images.
        """
        return f"image {self._row(index)} of split {self.name!r} ({self.origin(index, key or self.input_key, encoded)})"

    def origin(self, index: int | None, key: str, encoded: dict[str, Any] | None = None) -> str:
        """Say which file a row is from, or else which row of a table it is, and its column `key`.

        Args:
            index: the row's position; None: not known.
            key: of the column that is meant.
            encoded: the row's image; None: it is looked up where rows are known.
        """
        if encoded is None and index is not None and self.rows_known:
            encoded = self.data[index][self.input_key]
        path = (encoded or {}).get("path")
        if path and (encoded or {}).get("bytes") is None:
            return path
        row = [] if index is None else [f"row {self._row(index)}"]
        return ", ".join([*row, f"column {key!r}", *([path] if path else [])])

    def find(self, encoded: dict[str, Any] | None) -> int | None:
        """Search a true stream for the row of an image, for the seconds that a message may take; None: not found."""
        end, rows = time.monotonic() + _SEARCH_SECONDS, itertools.count()
        try:
            # by batches, since rows one by one are shared out to loader processes
            for batch in self.data.select_columns([self.input_key]).iter(_AT_ONCE):
                for index, found in zip(rows, batch[self.input_key]):
                    if found == encoded:
                        return index
                if time.monotonic() > end:
                    return None
        except (OSError, ValueError, NotImplementedError):  # as `read` meets them
            pass
        return None

    def _row(self, index: int) -> int:
        return index if self.rows is None else int(self.rows[index])

    def labels(self) -> np.ndarray:
        """Return the class indices (size,); not of a stream. No image is read.

        Raises:
            ApartError: where one is missing.
        """
        if isinstance(self.data, PackedTable):
            found = self.data.labels
            return found if self.relabel is None else self.relabel[found]
        column = self.data.select_columns([self.target_key]).with_format("arrow")[:][self.target_key]
        if column.null_count:
            first = int(column.is_null().to_numpy().argmax())
            raise ApartError(
                f"split {self.name!r}: {column.null_count} labels are missing, the first at {first} "
                f"({self.origin(first, self.target_key)})."
            )
        found = column.to_numpy().astype(np.int64)
        return found if self.relabel is None else self.relabel[found]

    def cells(self, indices: list[int]) -> list[tuple[dict[str, Any] | None, int]]:
        """Return (encoded image, class index) of rows, by one fast look-up for all; not of a stream."""
        rows = self.data[indices]
        labels = rows[self.target_key]
        return list(zip(rows[self.input_key], labels if self.relabel is None else self.relabel[labels].tolist()))

    def images(self, indices: list[int], *, skip_bad: bool = False) -> Iterator[tuple[int, PIL.Image, int]]:
        """Give (row, RGB image, class index) of rows, by one fast look-up for all; not of a stream.

        Raises:
            OneProcessError: naming the first that cannot be decoded, unless `skip_bad` passes over it.
        """
        for index, (encoded, label) in zip(indices, self.cells(indices)):
            try:
                image = rgb(encoded)
            except BadImage as error:
                if not skip_bad:
                    raise bad_image(self.place(index), error) from error
                continue
            yield index, image, label

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

    def read_rows(self, indices: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read rows that are known, each with its index, in the order of `indices`."""
        for start in range(0, len(indices), _AT_ONCE):
            some = indices[start : start + _AT_ONCE].tolist()
            columns = self.data[some]
            for index, *cells in zip(some, *columns.values()):
                yield index, dict(zip(columns, cells))

    def part(self, indices: np.ndarray) -> Split:
        """Return these rows alone."""
        rows = indices if self.rows is None else self.rows[indices]
        return replace(self, data=self.data.select(indices), size=len(indices), rows=rows)

    def image_size(self, skip_bad: bool) -> tuple[int, int]:
        """Return (width, height) in pixels that images have, see `image_sizes`."""
        return self.image_sizes(skip_bad).decided

    def image_sizes(self, skip_bad: bool) -> ImageSizes:
        """Look at the sizes of 256 images that are drawn by seed 0, of a true stream at those of the first.

        Their headers are read alone. Those that cannot be read are passed over where `skip_bad` says so.

        Raises:
            ApartError: for the first that cannot be read, unless `skip_bad`, and where none can.
        """
        if self.rows_known:
            drawn = np.random.default_rng(0).permutation(len(self.data))[:LOOKED_AT]
            cells = self.read_rows(np.sort(drawn))
        else:
            cells = enumerate(itertools.islice(self.read(), LOOKED_AT))
        found = []
        for index, cell in cells:
            try:
                found.append(upright_size(cell[self.input_key]))
            except BadImage as error:
                if not skip_bad:
                    raise bad_image(self.place(index, cell[self.input_key]), error) from error
        if not found:
            raise ApartError(f"no image of split {self.name!r} can be decoded.")
        return ImageSizes.of(found)


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
