"""Where a step computes: the device of its random numbers, and the processes that train together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def draw_device(generator: torch.Generator | None, model: nn.Module) -> torch.device:
    """Tell where random numbers are drawn: where the generator is, or where the model is, so that nothing waits."""
    return next(model.parameters()).device if generator is None else generator.device


def processes() -> int:
    """Count the processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def averaged(tensors: list[Tensor]) -> list[Tensor]:
    """Average tensors over all processes, by one all-reduce; those that are given stay each process's own."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= processes()
    sizes = [tensor.numel() for tensor in tensors]
    return [part.view_as(tensor) for part, tensor in zip(flat.split(sizes), tensors)]
