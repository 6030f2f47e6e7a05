"""The autocast that surrounds a step: only its two forwards are to run in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from torch import nn


class AmbientAutocast:
    """Takes the contexts of autocast away around a step, and back for its forwards.

    In a plain loop the backward stays outside of autocast, too: within it, a backward would compute in other dtypes.

    Args:
        network: what is trained; autocast for its devices, and for the CPU, is looked at.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self._contexts: list[Callable[[], AbstractContextManager[None]]] = []
        self.is_half = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave autocast within the block. `is_half` tells whether it was for float16."""
        kinds = {"cpu", *(p.device.type for p in self.network.parameters())}
        known = sorted(kind for kind in kinds if torch.amp.is_autocast_available(kind))
        active = [(kind, torch.get_autocast_dtype(kind)) for kind in known if torch.is_autocast_enabled(kind)]
        caches = torch.is_autocast_cache_enabled()
        self.is_half = any(dtype == torch.float16 for _, dtype in active)
        self._contexts = [partial(torch.autocast, kind, dtype=dtype, cache_enabled=caches) for kind, dtype in active]
        with ExitStack() as off:
            for kind, _ in active:
                off.enter_context(torch.autocast(kind, enabled=False))
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """Enter what was left, with an empty cache of cast weights: as the outermost context in a plain loop has."""
        torch.clear_autocast_cache()
        try:
            with ExitStack() as on:
                for context in self._contexts:
                    on.enter_context(context())
                yield
        finally:
            torch.clear_autocast_cache()
