"""The order of classes that an earlier run or the weights to start from record, and which is kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from timm.models import load_model_config_from_hf

from apart_hf.config.train_config import TrainConfig
from apart_hf.data import ImageData, load_image_data
from apart_hf.data.settings import DataSettings
from apart_hf.hub.model_folder import CLASS_MAP, CONFIG
from apart_hf.runs.location import find_folder
from apart_hf.utils.hub_client import offline_if_unreachable, transport_errors


def load_in_recorded_order(settings: DataSettings, config: TrainConfig) -> ImageData:
    """Load the data of a run; classes that a record has, too, come in its order.

    The record is that of the run which is gone on with, or else of the weights that training starts from.

    Raises:
        ApartError: where the data cannot be loaded.
    """
    folder = find_folder(config) if config.resume is not None else None
    order = _of_run(folder) if folder is not None else None
    if order is None and (folder is None or not folder.exists()):
        order = _of_weights(config)
    data = load_image_data(_with(settings, order))
    by_us = data.labels_from is not None  # the order is not the data's own
    if by_us and order is None and folder is not None and any((folder / "checkpoints").glob("step-*")):
        # a run of apart_hf 0.1.0 before its first evaluation: it sorted class folders by their code points
        data = load_image_data(_with(settings, sorted(data.class_names)))
    return data


def _with(settings: DataSettings, order: list[str] | None) -> DataSettings:
    return settings if order is None else dataclasses.replace(settings, class_order=tuple(order))


def _of_run(folder: Path) -> list[str] | None:
    try:
        return (folder / CLASS_MAP).read_text(encoding="utf-8").removesuffix("\n").split("\n")
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
