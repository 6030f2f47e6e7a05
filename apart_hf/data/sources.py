"""Opening a Hub dataset or a local folder, and what to say where that fails."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import datasets
import huggingface_hub
from datasets import Dataset, DatasetDict, IterableDatasetDict

from apart_hf.data.image_folder import ImageFolder
from apart_hf.data.parquet_files import BUILDERS, TableFiles
from apart_hf.data.registry import DatasetSpec
from apart_hf.data.settings import Only
from apart_hf.data.tree import Folder
from apart_hf.errors import ApartError, first_line, shown
from apart_hf.utils.hub_client import offline_if_unreachable, transport_errors


class Source(Protocol):
    """What a name or a folder stands for, before any split of it is loaded.

    `splits` are the names of the splits that are there; `load(names)` opens some of them; `notes` then say in words
    what was left out, `timm` in what timm's own reader of folders sees other classes, and `labels_from` what tells the
    labels, where no column of a table does. `seen` says what is there in the place of splits.
    """

    notes: list[str]
    timm: str | None
    labels_from: str | None

    @property
    def seen(self) -> str | None: ...

    @property
    def splits(self) -> list[str]: ...

    def load(self, names: Iterable[str]) -> Mapping[str, Dataset]: ...


class Opened:
    """A source whose splits `datasets` has opened already."""

    def __init__(self, data: DatasetDict | IterableDatasetDict):
        self._data = data
        self.notes: list[str] = []
        self.timm: str | None = None
        self.labels_from: str | None = None
        self.seen: str | None = None

    @property
    def splits(self) -> list[str]:
        """Return the names of the splits."""
        return list(self._data)

    def load(self, names: Iterable[str]) -> Mapping[str, Dataset]:
        """Return these splits."""
        return {name: self._data[name] for name in names}


def open_source(
    spec: DatasetSpec, streaming: bool = False, asked: Iterable[str] = (), only: Only | None = None
) -> Source:
    """Open a Hub dataset or a folder (images, parquet files, tar shards, or save_to_disk).

    Where the Hub cannot be reached, what is in the cache is used at once, and what is not is an error within seconds.

    Args:
        spec: which.
        streaming: whether rows are read as they come.
        asked: names of splits that the user gives.
        only: see `DataSettings`.

    Raises:
        ApartError: where that fails, with the reason and the cure.
    """
    with _explaining(spec) as reach:
        if not spec.local:
            with offline_if_unreachable() as reach.offline:
                return Opened(datasets.load_dataset(spec.path, spec.config, streaming=streaming))
        if not os.path.isdir(spec.path):  # False for a name that no file can have
            raise ApartError(f"--data-dir {spec.path} does not exist, or is no folder.")
        if any((Path(spec.path) / name).exists() for name in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(spec.path)
            if isinstance(saved, Dataset):  # one split, saved by itself
                saved = DatasetDict({str(saved.split or "train"): saved})
            return Opened(saved)
        return _open_folder(spec.path, streaming, asked, only)


def load_splits(source: Source, spec: DatasetSpec, names: Iterable[str]) -> Mapping[str, Dataset]:
    """Load these splits of a source.

    Raises:
        ApartError: where that fails, with the reason and the cure.
    """
    with _explaining(spec):
        return source.load(names)


def _open_folder(path: str, streaming: bool, asked: Iterable[str], only: Only | None) -> Source:
    """Tell by its files what a folder is: split folders of images, else tables, else class folders of images."""
    root = Folder(os.path.abspath(path))
    images = ImageFolder(root, asked, only)
    if images.named and images.splits:
        return images
    tables = [TableFiles(root, ending, streaming) for ending in BUILDERS]
    for found in tables:
        if found.splits and (found.named or not images.splits):
            return found
    if images.splits:
        return images
    raise ApartError(f"cannot load {path}: {_seen(root)}")


def _seen(root: Folder) -> str:
    """Say what is in a folder that can be no dataset, and the cure."""
    if root.has_images:
        tables = [name for name in root.other_files(".csv", ".tsv", ".json", ".jsonl") if not name.startswith(".")]
        folders = [f"{one.name}/" for one in root.folders]
        there = shown(folders, "folder") if folders else shown(root.images, "image")
        if tables:
            return (
                f"images and {tables[0]}, but no class folders; make it metadata.csv beside the images, with columns "
                "file_name and label, or move the images to one folder a class."
            )
        return f"{there}, but no class folders with images in them; move the images to one folder a class."
    archives = root.other_files(".zip", ".tar.gz", ".tgz", ".7z", ".rar")
    if archives:
        return f"no images, but {archives[0]}; unpack it, and name the folder that comes of it."
    unread = root.other_files(".heic", ".heif")
    if unread:
        there = shown(unread, "HEIC file")
        return f"no images that Pillow can read, but {there}; pip install pillow-heif, or convert them."
    files = root.other_files("")
    what = f"{shown(files, 'file')} that are no images" if files else "it is empty"
    return f"{what}; it needs whole parquet files, one folder of images a class, or a save_to_disk folder."


class _Reach:
    """Why the Hub is out of reach; empty where it is not."""

    offline = ""


@contextlib.contextmanager
def _explaining(spec: DatasetSpec) -> Iterator[_Reach]:
    """Turn what `datasets` raises into one line with the cure."""
    reach = _Reach()
    try:
        yield reach
    except ApartError:
        raise
    except (
        ValueError,
        OSError,
        KeyError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
        *transport_errors(),
    ) as error:
        raise ApartError(f"cannot load {spec.path}: {_explained(error, spec, reach.offline)}") from error


def _explained(error: Exception, spec: DatasetSpec, offline: str) -> str:
    """Write reason and cure in one line, of a message that is often a page long."""
    reason = first_line(error)
    if "generating the dataset" in reason and error.__cause__ is not None:
        reason = first_line(error.__cause__)
    configs = re.search(r"[Aa]vailable(?: configs)?: (\[.*?\])", str(error))
    if configs:
        missing = f", and {spec.config!r} is none of them" if spec.config else ""
        return f"it has several configurations{missing}; name one by --dataset-config: {configs[1]}."
    if "scripts are no longer supported" in reason:
        return f"{reason}; use a copy in parquet files, from the Hub or by --data-dir."
    if spec.local:
        return f"{reason}; it needs whole parquet files, one folder of images a class, or a save_to_disk folder."
    if offline:
        return f"{offline}, and the cache does not hold it; load it once with a connection, or use --data-dir."
    if "gated" in str(error):
        page = f"{huggingface_hub.constants.ENDPOINT}/datasets/{spec.path}"
        return f"it is gated; ask for access at {page}, then log in (hf auth login, or HF_TOKEN), or use --data-dir."
    return (
        f"{reason}; check the name and the connection, log in (hf auth login) where it is private, or use --data-dir."
    )
