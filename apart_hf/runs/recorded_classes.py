"""The order of classes that an earlier run or the weights to start from record, and which is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from timm.models import load_model_config_from_hf

from apart_hf.config.train_config import TrainConfig
from apart_hf.data import ImageData
from apart_hf.hub.model_folder import CLASS_MAP, CONFIG
from apart_hf.runs.location import find_folder
from apart_hf.utils.hub_client import offline_if_unreachable, transport_errors


def recorded_order(config: TrainConfig) -> list[str] | None:
    """Return the classes in the order of the run that is gone on with, or else of the weights to start from.

    None: neither is there, or records any.
    """
    folder = None if config.resume is None else find_folder(config)
    if folder is not None and folder.exists():
        return _of_run(folder)
    return _of_weights(config)


def order_of_an_old_run(config: TrainConfig, data: ImageData) -> list[str] | None:
    """Return the order of the class folders of a run of 0.1.0 that has not been evaluated, and records none.

    That version sorted them by their code points. None: it is no such run.
    """
    folder = None if config.resume is None else find_folder(config)
    by_us = data.labels_from is not None  # the order is not the data's own
    is_begun = folder is not None and any((folder / "checkpoints").glob("step-*"))
    return sorted(data.class_names) if by_us and is_begun and recorded_order(config) is None else None


def _of_run(folder: Path) -> list[str] | None:
    try:
        return (folder / "checkpoints" / CLASS_MAP).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError):
        return _names(_config(folder / "last"))


def _of_weights(config: TrainConfig) -> list[str] | None:
    """Read the names beside --initial-checkpoint, or those of a model that is named by its folder or repository."""
    if config.initial_checkpoint is not None:
        return _names(_config(Path(config.initial_checkpoint).parent))
    place, _, name = config.model.partition(":")
    if not config.pretrained or not name:
        return None
    if place == "local-dir":
        return _names(_config(Path(name)))
    missing: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, RuntimeError, *transport_errors())
    try:
        with offline_if_unreachable():
            return _names(load_model_config_from_hf(name)[0] or {})
    except missing:
        return None  # `make_model` says what is wrong with it


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _names(config: dict[str, Any]) -> list[str] | None:
    names = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
