"""How data are reached: packed arrays by numpy, all else by the package datasets, which need not be installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from apart_hf.data.packed import INPUT_KEY, TARGET_KEY, PackedFolder, PackedTable
from apart_hf.data.registry import DatasetSpec
from apart_hf.data.settings import Only
from apart_hf.errors import ApartError

if TYPE_CHECKING:
    from datasets import Dataset

    from apart_hf.data.sources import Source


@contextlib.contextmanager
def _by_datasets(spec: DatasetSpec) -> Iterator[None]:
    """Say what to install where the block finds no package datasets."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("datasets", "pyarrow"):
            raise
        raise ApartError(
            f"{spec.path} is read by the package {error.name.partition('.')[0]}, which is not installed: pip install "
            "datasets, or name a folder that `apart-hf pack` made elsewhere, by --data-dir."
        ) from error


def open_data(
    spec: DatasetSpec, streaming: bool = False, asked: Iterable[str] = (), only: Only | None = None
) -> Source | PackedFolder:
    """Open a Hub dataset or a folder (packed arrays, images, parquet files, tar shards, or save_to_disk).

    Args:
        spec: which.
        streaming: whether rows are read as they come.
        asked: names of splits that the user gives.
        only: see `DataSettings`.

    Raises:
        ApartError: where that fails, with the reason and the cure.
    """
    packed = PackedFolder.find(spec.path) if spec.local else None
    if packed is not None:
        return packed
    with _by_datasets(spec):
        from apart_hf.data.sources import open_source

        return open_source(spec, streaming, asked, only)


def load_tables(
    source: Source | PackedFolder, spec: DatasetSpec, names: Iterable[str]
) -> Mapping[str, Dataset] | Mapping[str, PackedTable]:
    """Load these splits of a source.

    Raises:
        ApartError: where that fails, with the reason and the cure.
    """
    if isinstance(source, PackedFolder):
        return source.load(names)
    from apart_hf.data.sources import load_splits

    return load_splits(source, spec, names)


def find_columns(table: Dataset | PackedTable, spec: DatasetSpec) -> tuple[str, str]:
    """Name the columns of images and of classes: those that are asked for, or those that are found.

    Raises:
        ApartError: where there is none, or several; it names all columns.
    """
    if isinstance(table, PackedTable):
        return spec.input_key or INPUT_KEY, spec.target_key or TARGET_KEY
    from apart_hf.data.columns import find_input_key, find_target_key

    return find_input_key(table, spec), find_target_key(table, spec)
