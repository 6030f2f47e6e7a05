"""What the datasets of loaders have found on the way: images that were passed over, and what is to be said of them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import Accelerator

_log = logging.getLogger(__name__)


def count_skipped(accelerator: Accelerator, loader: Any) -> int:
    """Count the images of a loader that all processes have passed over since the last call."""
    count = torch.tensor(loader.dataset.take_skipped(), device=accelerator.device)
    return int(accelerator.reduce(count, "sum"))


def say_warning(loader: Any) -> None:
    """Say what the data of a loader are found to be, once."""
    warning = getattr(loader.dataset, "warning", None)
    text = None if warning is None else warning()
    if text is not None:
        _log.warning("warning: %s", text)
