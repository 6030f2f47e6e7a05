"""What an exported model records of its training: the "apart" block of config.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from apart_hf.config.train_config import TrainConfig
from apart_hf.data import ImageData, registered
from apart_hf.utils.environment import git_commit, versions

# settings that say how it was trained, and nothing of the machine or its folders
_SETTINGS = (
    "epochs",
    "batch_size",
    "grad_accum_steps",
    "opt",
    "lr",
    "momentum",
    "weight_decay",
    "sched",
    "decay_milestones",
    "min_lr",
    "warmup_epochs",
    "warmup_lr",
    "clip_grad",
    "every",
    "global_norm",
    "mixup",
    "cutmix",
    "smoothing",
    "aa",
    "color_jitter",
    "reprob",
    "drop",
    "drop_path",
    "model_kwargs",
    "model_ema",
    "model_ema_decay",
    "sync_bn",
    "amp_dtype",
    "img_size",
    "padding",
    "max_steps",
    "val_fraction",
)


def training_record(
    config: TrainConfig,
    data: ImageData,
    hyper: dict[str, Any],
    *,
    passes: float,
    processes: int,
    source: PretrainedCfg | dict[str, Any],
) -> dict[str, Any]:
    """Method and hyper-parameters, data, settings, seed, versions and commit.

    Args:
        config: resolved.
        data: what is trained on.
        hyper: the strategy's hyper-parameters.
        passes: over the batch, in a step.
        processes: of the run.
        source: timm's pretrained_cfg of the model before training.
    """
    settings = {key: getattr(config, key) for key in _SETTINGS}
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    always = ("epochs", "batch_size", "opt", "lr", "momentum", "weight_decay", "sched", "amp_dtype", "img_size")
    kept = {k: v for k, v in settings.items() if v is not None and (k in always or v != defaults[k])}
    if config.sched != "multistep":
        kept.pop("decay_milestones", None)
    if config.initial_checkpoint is not None:
        kept["initial_checkpoint"] = Path(config.initial_checkpoint).name
    return {
        "method": config.method,
        **hyper,
        "passes": passes,
        "dataset": config.dataset_name,
        "data": _data(config, data),
        "settings": kept | ({"processes": processes} if processes > 1 else {}),
        "recipe": config.recipe,
        "seed": config.seed,
        "base_model": _base_model(config, source),
        "versions": versions(),
        "commit": git_commit(),
    }


def _base_model(config: TrainConfig, source: PretrainedCfg | dict[str, Any]) -> str | None:
    """The Hub's name of the weights that training started from, or what else was named as the model."""
    if not config.pretrained:
        return None
    place, _, name = config.model.rpartition(":")
    if place in ("hf_hub", "hf-hub"):
        return name.partition("@")[0]
    return Path(name).name if place else source.get("hf_hub_id")


def _data(config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """Name and Hub id are those of a registered dataset only where the data have its number of classes.

    "whole": what is measured on is that dataset's own split, not a part of it.
    """
    known = registered(config.dataset, config.data_dir)
    same = known is not None and known.num_classes == len(data.class_names)
    if data.spec.local:
        whole = same and known.source is None and data.held_out.size == known.val_size
    else:
        whole = config.val_fraction is None or data.test is not None
    hub_id = data.spec.hub_id if same else data.spec.path if not data.spec.local else None
    return {
        "name": config.dataset if same else None,
        "hub_id": hub_id,
        "config": data.spec.config,
        "split": data.train.name,
        "images": len(data.train),
        "whole": whole,
    }
