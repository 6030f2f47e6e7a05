"""A trained model as a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import nn

# What describes the weights that training started from, and is not true of ours.
_SOURCE_FIELDS = ("license", "origin_url", "paper_name", "paper_ids", "notes")


def export_folder(
    model: nn.Module, folder: Path, *, data_config: dict[str, Any], label_names: list[str], tag: str,
    apart: dict[str, Any],
) -> None:
    """Write model.safetensors and config.json, replacing `folder` as a whole.

    Args:
        model: a timm model, unwrapped.
        folder: the target.
        data_config: `apart_hf.data.data_config` of the evaluation images.
        label_names: class names by index.
        tag: timm's name of these weights, after the architecture's.
        apart: what to record of the training, under the key "apart".
    """
    folder = Path(folder)
    new, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    config = {
        "label_names": label_names,
        "apart": apart,
        "pretrained_cfg": {"tag": tag, **dict.fromkeys(_SOURCE_FIELDS)},
    }
    plain = copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format)  # safetensors takes nothing else
    save_for_hf(plain, str(new), model_config=config, safe_serialization=True, data_config=data_config)
    # safetensors makes its file private; a folder to be shared gets the permissions of its other file
    (new / "model.safetensors").chmod((new / "config.json").stat().st_mode & 0o777)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
