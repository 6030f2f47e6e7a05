"""Random numbers that depend on what is asked for, and not on what was drawn before."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def drawn_from(*entropy: int) -> Iterator[None]:
    """Within, the global generators of torch (CPU), numpy and Python start from `entropy`; then they go on as before.

    timm's and torchvision's transforms draw from all three.
    """
    seeds = np.random.SeedSequence(entropy).generate_state(4)
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(int(seeds[0]) << 32 | int(seeds[1]))
    np.random.seed(seeds[2])
    random.seed(int(seeds[3]))
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])
