"""Opening a Hub dataset or a local folder, and what to say where that fails."""

from __future__ import annotations

import os
import re
from pathlib import Path

import datasets
import huggingface_hub
from datasets import Dataset, DatasetDict, IterableDatasetDict

from apart_hf.data.registry import DatasetSpec
from apart_hf.errors import ApartError, first_line
from apart_hf.utils.hub_client import offline_if_unreachable, transport_errors


def open_splits(spec: DatasetSpec, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """Open every split of a Hub dataset or a folder (parquet files, image folders, or save_to_disk).

    Where the Hub cannot be reached, what is in the cache is used at once, and what is not is an error within seconds.

    Raises:
        ApartError: where that fails, with the reason and the cure.
    """
    folder, offline = Path(spec.path), ""
    if spec.local and not os.path.isdir(folder):  # False for a name that no file can have
        raise ApartError(f"--data-dir {spec.path} does not exist, or is no folder.")
    try:
        if spec.local:
            if any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
                saved = datasets.load_from_disk(str(folder))
                if isinstance(saved, Dataset):  # one split, saved by itself
                    saved = DatasetDict({str(saved.split or "train"): saved})
                return _streamed(saved) if streaming else saved
            kind = "parquet" if any(folder.rglob("*.parquet")) else "imagefolder"
            return datasets.load_dataset(kind, data_dir=str(folder), streaming=streaming)
        with offline_if_unreachable() as offline:
            return datasets.load_dataset(spec.path, spec.config, streaming=streaming)
    except (
        ValueError,
        OSError,
        KeyError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
        *transport_errors(),
    ) as error:
        raise ApartError(f"cannot load {spec.path}: {_explained(error, spec, offline)}") from error


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


def _streamed(saved: DatasetDict) -> IterableDatasetDict:
    parts = {name: max(1, min(64, len(data) // 100)) for name, data in saved.items()}
    return IterableDatasetDict({name: data.to_iterable_dataset(parts[name]) for name, data in saved.items()})
