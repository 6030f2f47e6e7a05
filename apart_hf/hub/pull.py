"""Fetching a model into a folder of one's own: weights, config.json, and what was published beside them."""

from __future__ import annotations

import contextlib
import shutil
from functools import partial
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from apart_hf.errors import ApartError
from apart_hf.hub.model_folder import CONFIG, WEIGHTS
from apart_hf.hub.pretrained import intact_pretrained, list_pretrained
from apart_hf.hub.staging import PUBLISHED
from apart_hf.utils.hub_client import attempt, offline_if_unreachable


def pull(name: str, folder: Path | None = None, *, revision: str | None = None) -> Path:
    """Fetch a model into a folder that timm and `load_pretrained` load.

    Args:
        name: one of `list_pretrained()`, or "user/name", a repository of the Hub.
        folder: is made, whole or not at all; None: one of the model's name, here.
        revision: the branch, tag or commit of a repository; None: its main branch.

    Returns:
        The folder.

    Raises:
        ApartError: where there is no such model, its weights are damaged, or the folder is there already or cannot be
            written.
    """
    target = Path(name.rsplit("/", 1)[-1]) if folder is None else folder
    if name not in list_pretrained() and Path(name).is_dir():
        raise ApartError(
            f"{name} is a folder here; name a repository user/name of the Hub, or a model that is released."
        )
    if target.exists():
        raise ApartError(f"{target} exists already; name another folder, or remove it.")
    source = intact_pretrained(name, revision=revision)
    if name not in list_pretrained():
        _fetch_rest(name, commit=source.name)
    new = target.with_name(f".{target.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        for file in (one for one in PUBLISHED if (source / one).is_file()):
            (new / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, new / file)
        new.rename(target)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise ApartError(f"cannot write {target}: {error.strerror or error}; name another folder.") from error
    return target


def _fetch_rest(name: str, commit: str) -> None:
    """Fetch what may be published beside weights and config.json into the same folder of the cache, if it is there."""
    with offline_if_unreachable():
        for file in (one for one in PUBLISHED if one not in (WEIGHTS, CONFIG)):
            with contextlib.suppress(RemoteEntryNotFoundError, LocalEntryNotFoundError):
                attempt(partial(hf_hub_download, name, file, revision=commit), name, reading=True)
