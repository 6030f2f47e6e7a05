"""Where in a network the first value that is not finite appears."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_nonfinite_layer(network: nn.Module, images: Tensor) -> str | None:
    """Name of the layer that is the first, in a forward over `images`, to put out a value that is not finite."""
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, (tuple, list)) else (output,)
        if any(isinstance(t, Tensor) and not t.isfinite().all() for t in tensors):
            found.append(name)

    hooks = [
        module.register_forward_hook(partial(look, name or type(module).__name__))
        for name, module in network.named_modules()
    ]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
