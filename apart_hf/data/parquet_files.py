"""Folders of parquet files or of tar shards: which file belongs to which split."""

from __future__ import annotations

import glob
from collections.abc import Iterable

import datasets
from datasets import DatasetDict, IterableDatasetDict

from apart_hf.data.image_folder import WHOLE
from apart_hf.data.split_names import in_usual_order, split_of_file
from apart_hf.data.tree import Folder
from apart_hf.errors import shown

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}  # by the ending of the files


class TableFiles:
    """Finds the splits of a folder of parquet files, or of tar files in WebDataset's form.

    The splits are those that the files' names or folders say (see `split_of_file`); where none does, all files are the
    one split "train".

    Args:
        root: what the user named.
        ending: of the files, a key of `BUILDERS`.
        streaming: whether they are read as they come.
    """

    def __init__(self, root: Folder, ending: str, streaming: bool):
        self._root, self._builder, self._streaming = root, BUILDERS[ending], streaming
        self.notes: list[str] = []
        self.timm: str | None = None
        self.labels_from: str | None = None
        self.seen: str | None = None
        self._files: dict[str, list[str]] = {}
        unnamed = []
        for inside in sorted(root.other_files(ending)):
            split = split_of_file(inside)
            if split is None:
                unnamed.append(inside)
            else:
                self._files.setdefault(split, []).append(inside)
        self.named = bool(self._files)
        if not self.named and unnamed:
            self._files[WHOLE] = unnamed
        elif unnamed:
            self.notes.append(f"{shown(unnamed, 'file')} of no split: left out")

    @property
    def splits(self) -> list[str]:
        """Return the names of the splits."""
        return in_usual_order(self._files)

    def load(self, names: Iterable[str]) -> DatasetDict | IterableDatasetDict:
        """Open these splits through the builders of `datasets`."""
        names = list(names)
        keys = {f"split{index}" if not name.isidentifier() else name: name for index, name in enumerate(names)}
        files = {key: [glob.escape(f"{self._root.path}/{one}") for one in self._files[keys[key]]] for key in keys}
        loaded = datasets.load_dataset(self._builder, data_files=files, streaming=self._streaming)
        return type(loaded)({name: loaded[key] for key, name in keys.items()})
