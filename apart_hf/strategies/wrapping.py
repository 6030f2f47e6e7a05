"""Strategies whose model is wrapped in DistributedDataParallel after they were made: gradients are not averaged."""

from __future__ import annotations

import gc
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from apart_hf.errors import ApartError


class _Wrappers:
    """Counts the wrappers that are made, from the first strategy on: nothing on a model tells that one is around it."""

    def __init__(self) -> None:
        self.made = 0
        self._counts = False

    def count(self) -> int:
        """Return how many were made, and begin to count them."""
        if not self._counts:
            register_module_module_registration_hook(self._registered)
            self._counts = True
        return self.made

    def _registered(self, module: nn.Module, name: str, submodule: Any) -> None:
        self.made += isinstance(module, DistributedDataParallel)


_WRAPPERS = _Wrappers()


class WrappingCheck:
    """Looks before a step whether the model was wrapped after its strategy was made, once for all wrappers so far.

    Args:
        model: of the strategy.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._known: int | None = None
        _WRAPPERS.count()

    def __call__(self) -> None:
        """Refuse a model that was wrapped.

        Raises:
            ApartError: where a wrapper around the model's parameters is not part of it; with a single process, too,
                since more of them would train apart.
        """
        made = _WRAPPERS.count()
        if made != self._known and dist.is_available() and dist.is_initialized():
            check_wrapping(self.model)
            self._known = made


def check_wrapping(model: nn.Module) -> None:
    """Refuse a model whose parameters are in a wrapper that is not part of it.

    Raises:
        ApartError: where there is one.
    """
    if wraps(model):
        return
    weights = {id(p) for p in model.parameters()}
    for found in gc.get_objects():
        if issubclass(type(found), DistributedDataParallel) and any(id(p) in weights for p in found.parameters()):
            raise ApartError(
                "the model is trained in DistributedDataParallel, and the strategy was made before it was wrapped, so "
                "that gradients would not be averaged; make the strategy of the wrapped model (after prepare)."
            )


def wraps(model: nn.Module) -> bool:
    """Tell whether a wrapper is part of the model."""
    return any(isinstance(module, DistributedDataParallel) for module in model.modules())


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network itself, so that names are the same in every wrapper."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
