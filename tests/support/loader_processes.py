"""Loader processes of a test end with it.

Where loaders are left to the collection of garbage, some later test waits five seconds for each of their processes.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch.utils.data import dataloader

_made: list[weakref.ref[Any]] = []


def note_loader_processes() -> None:
    """Remember, from now on, every pass of a DataLoader that has processes."""
    begin = dataloader._MultiProcessingDataLoaderIter.__init__

    @functools.wraps(begin)
    def noted(self: Any, *arguments: Any) -> None:
        _made.append(weakref.ref(self))
        begin(self, *arguments)

    dataloader._MultiProcessingDataLoaderIter.__init__ = noted  # type: ignore[method-assign]


def end_loader_processes() -> None:
    """End those of all passes so far."""
    for one in _made:
        if (found := one()) is not None and hasattr(found, "_workers"):
            found._shutdown_workers()
    _made.clear()
