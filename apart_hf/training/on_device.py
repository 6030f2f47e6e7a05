"""What changes from step to step, as tensors on the device: learning rates, counts of steps, the average's share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from timm.utils import ModelEmaV3
from torch import Tensor, nn


def is_capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether an optimizer's update can take all its numbers from the device, as those of torch can but Adagrad.

    Args:
        optimizer: `unwrapped`. Of others nothing is known: timm's Lookahead, say, shows the options of what it wraps.
    """
    kind, is_torch_s = type(optimizer), type(optimizer).__module__.startswith("torch.optim.")
    return kind is torch.optim.SGD or (is_torch_s and "capturable" in optimizer.defaults)


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return what Accelerate has prepared."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


class UpdateOnDevice:
    """Lets an optimizer's update read learning rates and counts of steps from the device.

    Outside of the update its groups hold numbers, as schedules, logs and checkpoints expect them.

    Args:
        optimizer: that `is_capturable`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        # float32 is what the fused kernel of SGD reads
        self._rates = [
            torch.zeros((), dtype=torch.float32, device=group["params"][0].device) for group in optimizer.param_groups
        ]
        self._known: list[float | None] = [None] * len(self._rates)

    def refresh(self) -> None:
        """Take over the learning rates that a schedule has set, and counts of steps that a checkpoint has brought."""
        for k, (rate, group) in enumerate(zip(self._rates, self.optimizer.param_groups)):
            if group["lr"] != self._known[k]:
                self._known[k] = group["lr"]
                rate.fill_(group["lr"])
        for p, state in self.optimizer.state.items():
            if isinstance(state.get("step"), Tensor) and state["step"].device != p.device:
                state["step"] = state["step"].to(p.device)

    @contextmanager
    def within(self) -> Iterator[None]:
        """Let the optimizer read them within the block."""
        before = [dict(group) for group in self.optimizer.param_groups]
        try:
            for group, rate in zip(self.optimizer.param_groups, self._rates):
                options = _options(self.optimizer, group)
                group.update(options, lr=rate)
                if not options["foreach"]:
                    _align(self.optimizer, group["params"])
            yield
        finally:
            for group, options in zip(self.optimizer.param_groups, before):
                group.update(options)


def _options(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, bool]:
    """Return the options with which torch asks the host for no number."""
    if isinstance(optimizer, torch.optim.SGD):
        return {"fused": True, "foreach": False}
    return {"capturable": True, "foreach": not group.get("fused")}


def _align(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Give gradients and what the optimizer keeps the strides of their parameters.

    The fused kernels of GPUs refuse others, also where they differ in a dimension of size 1 alone, as those of
    depthwise and 1x1 convolutions may in channels_last.
    """
    for p in parameters:
        if p.grad is not None:
            p.grad = _strided(p.grad, p)
        kept = optimizer.state.get(p, {})
        kept.update({key: _strided(v, p) for key, v in kept.items() if isinstance(v, Tensor) and v.shape == p.shape})


def _strided(values: Tensor, like: Tensor) -> Tensor:
    if values.stride() == like.stride():
        return values
    if all(a == b for a, b, size in zip(values.stride(), like.stride(), like.shape) if size > 1):
        return values.as_strided(like.shape, like.stride())
    return torch.empty_strided(like.shape, like.stride(), dtype=values.dtype, device=values.device).copy_(values)


class AverageOnDevice:
    """Updates timm's average of a network by a share that is on the device.

    Args:
        ema: that `is_plain`.
        network: unwrapped.
    """

    def __init__(self, ema: ModelEmaV3, network: nn.Module):
        self.ema = ema
        pairs = list(zip(ema.module.state_dict().values(), network.state_dict().values()))
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._averaged: list[tuple[Tensor, list[Tensor], list[Tensor]]] = []
        for dtype in {average.dtype for average, _ in floats}:
            alike = [pair for pair in floats if pair[0].dtype == dtype]
            averages, values = [average for average, _ in alike], [value for _, value in alike]
            self._averaged.append((averages[0].new_zeros(()), averages, values))

    @staticmethod
    def is_plain(ema: ModelEmaV3) -> bool:
        """Tell whether all values are averaged where they are, and as they are."""
        elsewhere = ema.device is not None or ema.dtype is not None or ema.exclude_buffers
        return not elsewhere and all(value.dtype != torch.bfloat16 for value in ema.module.state_dict().values())

    def refresh(self, step: int) -> None:
        """Take over the share of the network's values in the average after a step, which rises as timm has it."""
        for share, *_ in self._averaged:
            share.fill_(1.0 - self.ema.get_decay(step))

    @torch.no_grad()
    def update(self) -> None:
        """Do what `ModelEmaV3.update` does."""
        for share, averages, values in self._averaged:
            torch._foreach_lerp_(averages, values, [share] * len(values))
        for count, value in self._counts:
            count.copy_(value)
