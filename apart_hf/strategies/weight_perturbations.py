"""Sharpness-aware minimisation: a step uphill in the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from apart_hf.errors import ApartError
from apart_hf.strategies.machine import averaged
from apart_hf.strategies.perturbation import Perturbation, checked_option, checked_radius, processes


class Weights(Perturbation):
    """Takes SAM's step, phi + rho * g / ||g||_2, over all trainable parameters (Eq. 7 with p = 2).

    Its subclasses are of the same form, phi + rho * T^2 g / ||T g||_2, with another T or over fewer parameters.

    Args:
        model: the network, possibly wrapped.
        rho: radius in the weights' own units, >= 0.
        global_norm: several processes climb the mean of their gradients, all by the same step (one more all-reduce).
            False: each its own gradient (the m-sharpness of Foret et al.).
    """

    defaults: ClassVar = {"rho": 0.05, "global_norm": False}
    reads_weight_gradients = True
    counts_samples = False

    def __init__(self, model: nn.Module, *, rho: float, global_norm: bool):
        self.model, self.global_norm = model, checked_option("global_norm", global_norm)
        self.rho = checked_radius("rho", rho, "the paper uses 0.05 to 0.2")
        self._steps: list[tuple[nn.Parameter, Tensor]] = []

    def _moved(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name the parameters that take part."""
        return self.model.named_parameters()

    def _size(self, name: str, p: nn.Parameter) -> Tensor | None:
        """Return T, the size of a unit step for each element; None: 1."""

    @torch.no_grad()
    def ascend(self, generator: torch.Generator | None = None) -> None:
        """Compute the step. A zero or non-finite gradient gives none."""
        self._steps = []
        averages = self.global_norm and processes() > 1
        # where gradients are averaged, every process needs the same list: a parameter may be unused on one of them
        moved = [(name, p) for name, p in self._moved() if p.requires_grad and (averages or p.grad is not None)]
        if not moved:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in moved]
        if averages:
            gradients = averaged(gradients)
        sizes = [self._size(name, p) for name, p in moved]
        scaled = [g if size is None else g * size for g, size in zip(gradients, sizes)]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(scaled)))
        usable = norm.isfinite() & (norm > 0)
        scale = torch.where(usable, self.rho / norm, 0.0)
        self._steps = [
            (p, torch.where(usable, (g if size is None else g * size) * scale, 0.0))
            for (_, p), g, size in zip(moved, scaled, sizes)
        ]

    @contextmanager
    def applied(self, samples: int) -> Iterator[None]:
        # put back by copy: adding and subtracting the step would leave rounding errors, different on each rank; through
        # .data, since the weights come back as they were: graphs that hold them, of other terms of a loss, stay valid
        before = [(p, p.detach().clone()) for p, _ in self._steps]
        try:
            with torch.no_grad():
                for p, step in self._steps:
                    p.data.add_(step)
            self._steps = []
            torch.clear_autocast_cache()  # it may hold casts of the weights as they were
            yield
        finally:
            self._steps = []
            with torch.no_grad():
                for p, value in before:
                    p.data.copy_(value)
            torch.clear_autocast_cache()


class AdaptiveWeights(Weights):
    """Takes ASAM's step (Kwon et al. 2021, Eq. 8 with p = 2): T = |w| + eta for parameters named weight, 1 for others.

    Args:
        rho: radius relative to the weights' sizes, >= 0.
        eta: keeps T from zero, >= 0.
        global_norm: see `Weights`.
    """

    defaults: ClassVar = {"rho": 0.5, "eta": 0.01, "global_norm": False}

    def __init__(self, model: nn.Module, *, rho: float, eta: float, global_norm: bool):
        super().__init__(model, rho=rho, global_norm=global_norm)
        self.eta = checked_radius("eta", eta, "ASAM's paper uses 0.01")

    def _size(self, name: str, p: nn.Parameter) -> Tensor | None:
        return p.abs().add_(self.eta) if "weight" in name.rpartition(".")[2] else None


class NormalisationWeights(Weights):
    """Takes SAM-ON's step (Mueller et al. 2023): SAM over the parameters of normalisation layers only.

    Args:
        rho: radius in the weights' own units, >= 0.
        global_norm: see `Weights`.

    Raises:
        ApartError: where no normalisation layer has trainable parameters.
    """

    defaults: ClassVar = {"rho": 0.5, "global_norm": False}

    def __init__(self, model: nn.Module, *, rho: float, global_norm: bool):
        super().__init__(model, rho=rho, global_norm=global_norm)
        kinds = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
        self._layers = [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]
        if not any(p.requires_grad for _, p in self._moved()):
            raise ApartError(
                f"{type(model).__name__} has no normalisation layer with trainable parameters; use the method 'sam'."
            )

    def _moved(self) -> Iterator[tuple[str, nn.Parameter]]:
        for prefix, layer in self._layers:
            yield from layer.named_parameters(prefix, recurse=False)
