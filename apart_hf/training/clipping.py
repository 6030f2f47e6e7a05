"""Clipping of the combined gradient, by timm's ways."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from accelerate import Accelerator
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad
from torch import nn

ClipMode = Literal["norm", "value", "agc"]


def clip_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    bound: float,
    mode: ClipMode,
    held: Iterable[nn.Parameter] = (),
) -> None:
    """Clip the gradients of a step, after they were summed over batches and processes, and unscaled.

    Args:
        accelerator: has prepared model and optimizer.
        model: in any wrapper.
        optimizer: of the model.
        bound: what is clipped to.
        mode: "norm": of the whole gradient; "value": each component; "agc": the norm of each unit's gradient, as a
            share of that of its weights, but for the classifier's (timm's adaptive gradient clipping).
        held: what is trained beside the model; the whole gradient is that of both.
    """
    if mode == "norm":
        accelerator.clip_grad_norm_([*model.parameters(), *held], bound)
        return
    accelerator.unscale_gradients(optimizer)
    parameters = model_parameters(accelerator.unwrap_model(model), exclude_head=mode == "agc")
    dispatch_clip_grad([*parameters, *held], bound, mode=mode)
