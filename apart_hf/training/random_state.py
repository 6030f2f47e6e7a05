"""The state of every global random generator, to be kept and set again."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of every global generator, in types that torch reads without running code."""
    numpy = np.random.get_state(legacy=False)
    kind, inner = numpy["bit_generator"], numpy["state"]
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, inner["key"].tolist(), inner["pos"], numpy["has_gauss"], numpy["gauss"]],
    }
    return state | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Any]) -> None:
    """Set what `random_state` returned."""
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
