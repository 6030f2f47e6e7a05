"""Batch normalisation of groups of samples at once: forward and backward by the set of kernels that fits the device.

Both sets compute the same. `cpu_kernels` are the fastest on a CPU, `device_kernels` have the fewest launches.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from apart_hf.batchnorm import composed, cpu_kernels, device_kernels
from apart_hf.batchnorm.affine import Affine
from apart_hf.batchnorm.layouts import Grouping
from apart_hf.batchnorm.normalised import Gradients, MeanAndVariance, Normalised, Statistics
from apart_hf.errors import ApartError

KernelSet = Literal["auto", "cpu", "device"]
_SETS: dict[str, ModuleType | None] = {"auto": None, "cpu": cpu_kernels, "device": device_kernels}
_forced: ModuleType | None = None


class use_kernels:
    """Let all batch normalisation of the strategies use one set of kernels, from now on or within a `with` block.

    Args:
        name: "cpu", "device", or "auto": by the device that the activations are on.

    Raises:
        ApartError: where there is no such set.

    Example:
        >>> from apart_hf.batchnorm import use_kernels
        >>> with use_kernels("device"):
        ...     pass  # steps of a strategy
    """

    def __init__(self, name: KernelSet):
        global _forced
        if name not in _SETS:
            raise ApartError(f"there is no set of kernels {name!r}; choose from {', '.join(_SETS)}.")
        self._before, _forced = _forced, _SETS[name]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _forced
        _forced = self._before


def forward(
    x: Tensor,
    affine: Affine,
    buffers: MeanAndVariance | None,
    momentum: float,
    eps: float,
    grouping: Grouping,
    sync: dist.ProcessGroup | None,
    shifted: bool,
) -> Normalised:
    """Compute weight * (x - mu)/sigma + bias + shift * mu/sigma, with mu and sigma of each group.

    Args:
        x: (N * rows, C, ...).
        affine: weight, bias and shift.
        buffers: running (mean, var) to update, with one group; None: leave no trace.
        momentum: of that update.
        eps: added to the variance.
        grouping: of x.
        sync: processes whose batches share their statistics, as in SyncBatchNorm.
        shifted: False promises that shift is zero.

    Returns:
        The output and the statistics.
    """
    if sync is not None:
        return composed.forward(x, affine, buffers, momentum, eps, grouping, shifted, sync)
    return _for(x.device).forward(x, affine, buffers, momentum, eps, grouping, shifted)


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Statistics,
    eps: float,
    grouping: Grouping,
    sync: dist.ProcessGroup | None,
    needs_grad_x: bool,
) -> Gradients:
    """Compute the gradients for x, and for weight and bias of each group, (groups * C,) each."""
    if sync is not None:
        return composed.backward(grad_out, x, weight, saved, grouping, needs_grad_x, sync)
    return _for(x.device).backward(grad_out, x, weight, saved, eps, grouping, needs_grad_x)


def is_served_by_launches(device: torch.device) -> bool:
    """Tell whether a device works through what is launched, so that whoever asks it for a number has to wait."""
    return _for(device) is device_kernels


def _for(device: torch.device) -> ModuleType:
    return _forced or (cpu_kernels if device.type == "cpu" else device_kernels)
