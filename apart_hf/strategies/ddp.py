"""DistributedDataParallel around two passes: they run within its forward, on the network that it wraps."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apart_hf.errors import ApartError
from apart_hf.strategies.machine import averaged, processes

_log = logging.getLogger(__name__)
_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks")


def find_ddp(model: nn.Module, *, warns: bool = True) -> DistributedDataParallel | None:
    """Find the DistributedDataParallel that is the model, or all that torch.compile has compiled; None: there is none.

    Args:
        model: the network, possibly wrapped.
        warns: of a compiled one, within which passes run uncompiled.

    Raises:
        ApartError: where it wraps a part of the model.
    """
    outer = model
    while isinstance(inner := getattr(outer, "_orig_mod", None), nn.Module):
        outer = inner
    if isinstance(outer, DistributedDataParallel):
        if warns and outer is not model:
            _log.warning("the model is compiled outside of DistributedDataParallel, and the two passes run uncompiled.")
        return outer
    part = next((name for name, module in model.named_modules() if isinstance(module, DistributedDataParallel)), None)
    if part is not None:
        raise ApartError(
            f"DistributedDataParallel wraps {part!r}, a part of the model; wrap the whole, or pass that part alone."
        )
    return None


def averages_gradients(model: nn.Module) -> bool:
    """Tell whether a DistributedDataParallel in the model averages gradients now: it is not in no_sync."""
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    return any(wrapper.require_backward_grad_sync for wrapper in wrappers)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients of parameters that no wrapper knows over all processes; none counts as zero."""
    trained = [p for p in parameters if p.requires_grad]
    if trained and processes() > 1:
        gradients = averaged([torch.zeros_like(p) if p.grad is None else p.grad for p in trained])
        for p, gradient in zip(trained, gradients):
            p.grad = gradient.clone()


def runs_within() -> bool:
    """Tell whether DDP's forward is running, so that it awaits the backward of what is computed now."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None) is not None


def within_forward(ddp: DistributedDataParallel, compute: Callable[[], Tensor]) -> Tensor:
    """Run `compute` in the place of the wrapped network's forward, so that DDP awaits the backward of what it returns.

    Within it the network has its own forward and hooks again, also one that stood in its `__dict__` (where accelerate
    keeps autocast).

    Args:
        ddp: the wrapper.
        compute: may call the network, `ddp.module`; autograd.grad within it does not fire DDP's hooks.

    Returns:
        What `compute` returns.
    """
    network = ddp.module
    before = {key: network.__dict__[key] for key in ("forward", *_HOOKS) if key in network.__dict__}

    def restore() -> None:
        network.__dict__.update(before)
        if "forward" not in before:
            network.__dict__.pop("forward", None)

    def forward(_: None) -> Tensor:
        restore()
        return compute()

    try:
        network.__dict__.update({key: OrderedDict() for key in _HOOKS}, forward=forward)
        return ddp(None)
    finally:
        restore()
