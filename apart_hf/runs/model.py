"""The network of a run, from its settings and its data."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.models import get_model_input_config
from torch import nn

from apart_hf.config.key_values import key_values
from apart_hf.config.model_arguments import channels_of
from apart_hf.config.train_config import TrainConfig
from apart_hf.data import ImageData, data_config
from apart_hf.data.settings import CHANNELS
from apart_hf.errors import ApartError, first_line
from apart_hf.models import pretrained_cfg
from apart_hf.runs.factory import create_model, read_weights
from apart_hf.runs.failures import is_out_of_memory
from apart_hf.utils.hub_client import offline_if_unreachable


def make_model(config: TrainConfig, data: ImageData) -> tuple[nn.Module, dict[str, Any]]:
    """Make the timm model for the data's classes, and timm's description of its evaluation images."""
    usual = {
        "drop_rate": config.drop,
        "drop_path_rate": config.drop_path,
        "global_pool": config.gp,
        "pretrained": config.pretrained,
        "weights": config.pretrained_path,
        "bn_momentum": config.bn_momentum,
        "bn_eps": config.bn_eps,
        "in_chans": channels_of(config),
    }
    kwargs: dict[str, Any] = {key: value for key, value in usual.items() if value} | key_values(config.model_kwargs)
    try:
        source = timm.get_pretrained_cfg(config.model)
        if source is not None and source.fixed_input_size and config.img_size is not None:
            kwargs["img_size"] = config.img_size
        with offline_if_unreachable():  # weights may be in the cache
            model = create_model(config.model, num_classes=len(data.class_names), **kwargs)
        if config.grad_checkpointing:
            cast(Any, model).set_grad_checkpointing()  # of timm's models
    except ApartError:
        raise
    except (RuntimeError, ValueError, OSError, TypeError, AssertionError, AttributeError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        raise ApartError(f"cannot create model {config.model!r}: {first_line(error)}") from error
    if config.initial_checkpoint is not None:
        load_weights(model, config.initial_checkpoint)
    channels = get_model_input_config(model)["input_size"][0]
    if channels not in CHANNELS:
        raise ApartError(
            f"model {config.model!r} takes images of {channels} channels, and images are read with 1 or 3 only; name "
            "another, or --in-chans 3."
        )
    size = data_config(
        pretrained_cfg(model),
        data.image_size,
        img_size=config.img_size,
        mean=config.mean or data.spec.mean,
        std=config.std or data.spec.std,
        crop_pct=config.crop_pct,
        interpolation=None if config.interpolation == "random" else config.interpolation,
        channels=channels,
    )
    try:
        with torch.no_grad():
            output = model.eval()(torch.zeros(1, *size["input_size"]))
    except (RuntimeError, ValueError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        edge, usual = size["input_size"][-1], pretrained_cfg(model)["input_size"][-1]
        further = f" or leave --model-kwargs {' '.join(config.model_kwargs)} out" if config.model_kwargs else ""
        raise ApartError(
            f"model {config.model!r} does not take images of {edge} pixels ({first_line(error)}); "
            f"try --img-size {usual}, the model's own{further and ',' + further}."
        ) from error
    if not isinstance(output, torch.Tensor) or output.shape != (1, len(data.class_names)):
        raise ApartError(
            f"model {config.model!r} does not give one value for each of the {len(data.class_names)} classes; leave "
            "--model-kwargs such as features_only out."
        )
    if config.sync_bn:
        model = convert_sync_batchnorm(model)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model, size


def load_weights(model: nn.Module, file: str) -> None:
    """Load weights from a safetensors file or a state_dict; a classifier of another size keeps its random start.

    Raises:
        ApartError: where the file cannot be read without running code from it, or belongs to another model.
    """
    state = read_weights("--initial-checkpoint", file)
    own = model.state_dict()
    named = pretrained_cfg(model).get("classifier") or ()
    heads = (named,) if isinstance(named, str) else tuple(named)
    for key in [k for k in state if k.rsplit(".", 1)[0] in heads and k in own and state[k].shape != own[k].shape]:
        state[key] = own[key]
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ApartError(f"--initial-checkpoint {file}: its weights are of another model ({reason}).") from error
