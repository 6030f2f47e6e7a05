"""What an exported model records of its training: the "apart" block of config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apart_hf.config.train_config import SETTINGS, CompleteConfig, TrainConfig
from apart_hf.data import ImageData, registered
from apart_hf.hub.training_record import DataRecord, TrainingRecord
from apart_hf.utils.environment import git_commit, versions


def training_record(
    config: CompleteConfig,
    data: ImageData,
    hyper: dict[str, Any],
    *,
    passes: float,
    processes: int,
    source: dict[str, Any],
) -> TrainingRecord:
    """Record method and hyper-parameters, data, settings, seed, versions and commit.

    Args:
        config: resolved.
        data: what is trained on.
        hyper: the strategy's hyper-parameters.
        passes: over the batch, in a step on average.
        processes: of the run.
        source: timm's pretrained_cfg of the model before training.
    """
    kept = _settings(config)
    if config.sched != "multistep":
        kept.pop("decay_milestones", None)
    for name in ("initial_checkpoint", "pretrained_path"):
        if getattr(config, name) is not None:
            kept[name] = Path(getattr(config, name)).name
    return TrainingRecord(
        config.method,
        hyper,
        passes,
        config.dataset_name,
        _data(config, data),
        kept | ({"processes": processes} if processes > 1 else {}),
        config.recipe,
        config.seed,
        _base_model(config, source),
        versions(),
        git_commit(),
    )


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that say how a model was trained, and nothing of the machine or its folders."""
    found = {}
    for setting in sorted(SETTINGS.values(), key=lambda setting: setting.recorded or 0):
        value = getattr(config, setting.name)
        known = setting.recorded is not None and value is not None
        if known and (setting.recorded_by_default or value != setting.default):
            found[setting.name] = value
    return found


def _base_model(config: TrainConfig, source: dict[str, Any]) -> str | None:
    """Return the Hub's name of the weights that training started from, or what else was named as the model."""
    if not config.pretrained or config.pretrained_path is not None:
        return None
    place, _, name = config.model.rpartition(":")
    if place in ("hf_hub", "hf-hub"):
        return name.partition("@")[0]
    return Path(name).name if place else source.get("hf_hub_id")


def _data(config: TrainConfig, data: ImageData) -> DataRecord:
    """Name and Hub id are those of a registered dataset only where the data have its number of classes.

    "whole": what is measured on is that dataset's own split, not a part of it.
    """
    known = registered(config.dataset, config.data_dir)
    if known is not None and known.num_classes != len(data.class_names):
        known = None
    if data.spec.local:
        whole = known is not None and known.source is None and data.held_out.size == known.val_size
    else:
        whole = config.val_fraction is None or data.test is not None
    hub_id = data.spec.hub_id if known is not None else data.spec.path if not data.spec.local else None
    return DataRecord(
        config.dataset if known is not None else None,
        hub_id,
        data.spec.config,
        data.train.name,
        len(data.train),
        whole,
        data.timm,
    )
