"""What all layers of a pass share, so that it is done for all of them at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf.batchnorm.affine import Affine


@dataclass
class Shared:
    """Holds the affine parts of the layers of a pass, and what is to be done when they have run.

    One object is for all passes of a strategy: torch.compile would compile anew for a fresh one.

    Args:
        make_affine: computes the affine parts of all layers, by name; None: each layer computes its own.
        ran: counters of batches, and how often their layers ran since they were last advanced.
        eps: the machine epsilon of the 16-bit activations seen so far, 0 for none.
    """

    make_affine: Callable[[], Mapping[str, Affine]] | None = None
    ran: Counter[Tensor] = field(default_factory=Counter)
    eps: float = 0.0
    _affine: Mapping[str, Affine] | None = None

    def affine(self, name: str) -> Affine | None:
        """Return the affine part of a layer, which the first one that asks computes for all; None: it is its own."""
        if self._affine is None and self.make_affine is not None:
            # the layer may run without gradients now, and with them later (reentrant checkpointing)
            with torch.enable_grad():
                self._affine = self.make_affine()
        return None if self._affine is None else self._affine.get(name)

    def end(self) -> None:
        """Count the batches of all layers that ran, and forget the pass."""
        for times in set(self.ran.values()):
            torch._foreach_add_([counter for counter, ran in self.ran.items() if ran == times], times)
        self.ran.clear()
        self.make_affine, self._affine, self.eps = None, None, 0.0

    def running_statistics(self, layer: _BatchNorm) -> tuple[tuple[Tensor, Tensor] | None, float]:
        """Return the buffers to update and their momentum, and count the batch, as `_BatchNorm.forward` does."""
        momentum = 0.0 if layer.momentum is None else layer.momentum
        if layer.track_running_stats and layer.num_batches_tracked is not None:
            if layer.momentum is not None and not torch.compiler.is_compiling():
                self.ran[layer.num_batches_tracked] += 1
            else:
                layer.num_batches_tracked.add_(1)
            if layer.momentum is None:  # cumulative average
                momentum = 1.0 / float(layer.num_batches_tracked)
        if not layer.track_running_stats or layer.running_mean is None or layer.running_var is None:
            return None, momentum
        return (layer.running_mean, layer.running_var), momentum

    def mark(self, activation_eps: Tensor, dtype: torch.dtype) -> None:
        """Leave the machine epsilon of 16-bit activations where the attack finds it."""
        if dtype not in (torch.float16, torch.bfloat16):
            return
        eps = torch.finfo(dtype).eps
        if torch.compiler.is_compiling():
            activation_eps.fill_(eps)
        elif eps > self.eps:
            activation_eps.fill_(eps)
            self.eps = eps
