"""Batch normalisation of groups of samples at once: forward and backward by the set of kernels that fits the device.

All sets compute the same. `cpu_kernels` are the fastest on a CPU of those whose running statistics are bit for bit a
plain step's, `row_kernels` are faster in NCHW, and `device_kernels` have the fewest launches.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from apart_hf.batchnorm import composed, cpu_kernels, device_kernels, row_kernels
from apart_hf.batchnorm.affine import Affine
from apart_hf.batchnorm.normalised import Gradients, Normalisation, Normalised, Statistics
from apart_hf.errors import ApartError

KernelSet = Literal["auto", "cpu", "rows", "device"]
_SETS: dict[str, ModuleType | None] = {"auto": None, "cpu": cpu_kernels, "rows": row_kernels, "device": device_kernels}
_forced: ModuleType | None = None


class use_kernels:
    """Let all batch normalisation of the strategies use one set of kernels, from now on or within a `with` block.

    Args:
        name: "auto": "cpu" or "device", by where the activations are. "rows": as "cpu", with statistics by rows of
            memory in the clean pass, too: running statistics then differ from a plain step's by rounding.

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


def forward(x: Tensor, affine: Affine, how: Normalisation) -> Normalised:
    """Compute weight * (x - mu)/sigma + bias + shift * mu/sigma, with mu and sigma of each group.

    Args:
        x: (N * rows, C, ...).
        affine: weight, bias and shift.
        how: see `Normalisation`.

    Returns:
        The output and the statistics.
    """
    return _chosen(x, how).forward(x, affine, how)


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, saved: Statistics, how: Normalisation, needs_grad_x: bool
) -> Gradients:
    """Compute the gradients for x, and for weight and bias of each group, (groups * C,) each."""
    return _chosen(x, how).backward(grad_out, x, weight, saved, how, needs_grad_x)


def is_served_by_launches(device: torch.device) -> bool:
    """Tell whether a device works through what is launched, so that whoever asks it for a number has to wait."""
    return _for(device) is device_kernels


def _for(device: torch.device) -> ModuleType:
    return _forced or (cpu_kernels if device.type == "cpu" else device_kernels)


def _chosen(x: Tensor, how: Normalisation) -> ModuleType:
    return _for(x.device) if how.sync is None else composed
