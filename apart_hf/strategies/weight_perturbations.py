"""Sharpness-aware minimisation: a step uphill in the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from apart_hf.errors import ApartError
from apart_hf.strategies.flat import flat_copy, safe_ratio
from apart_hf.strategies.machine import averaged, processes
from apart_hf.strategies.perturbation import Perturbation
from apart_hf.strategies.scalars import checked_option, checked_radius


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
        self._moving: list[nn.Parameter] = []
        self._steps: list[Tensor] = []

    def _moved(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name the parameters that take part."""
        return self.model.named_parameters()

    def _sizes(self, moved: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return T, the size of a unit step for each element, of the parameters in which it is not 1."""
        return {}

    def _scale(self, norms: Tensor, moved: list[Tensor]) -> Tensor:
        """Return what T^2 g is multiplied by, from the norms of T g: one number, or one for each parameter."""
        return safe_ratio(self.rho, torch.linalg.vector_norm(norms))

    @torch.no_grad()
    def ascend(self, generator: torch.Generator | None = None) -> None:
        """Compute the step. A zero or non-finite gradient gives none."""
        self._moving, self._steps = [], []
        averages = self.global_norm and processes() > 1
        # where gradients are averaged, every process needs the same list: a parameter may be unused on one of them
        moved = {name: p for name, p in self._moved() if p.requires_grad and (averages or p.grad is not None)}
        if not moved:
            return
        parameters: list[Tensor] = list(moved.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if averages:
            gradients = averaged(gradients)
        sizes = self._sizes(moved)
        if sizes:
            gradients = _multiplied(gradients, moved, sizes)
        norms = torch.stack(torch._foreach_norm(gradients))
        scale = self._scale(norms, parameters)
        if sizes:
            gradients = _multiplied(gradients, moved, sizes)
        flat, steps = flat_copy(gradients, parameters)
        if scale.dim():
            torch._foreach_mul_(steps, list(scale.unbind()))
        else:
            flat.mul_(scale)
        flat.masked_fill_(~(norms < torch.inf).all(), 0.0)
        self._moving, self._steps = list(moved.values()), steps

    def move_too(self, stand_ins: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Take the step of a parameter in what stands in its place in the pass that comes, too: an auxiliary gamma."""
        steps = [(stand_ins[p], step) for p, step in zip(self._moving, self._steps) if p in stand_ins]
        self._moving = [*self._moving, *(own for own, _ in steps)]
        self._steps = [*self._steps, *(step for _, step in steps)]

    def release(self) -> None:
        self._moving, self._steps = [], []

    @contextmanager
    def applied(self, samples: int) -> Iterator[None]:
        # put back by copy: adding and subtracting the step would leave rounding errors, different on each rank; through
        # .data, since the weights come back as they were: graphs that hold them, of other terms of a loss, stay valid
        weights, steps = [p.data for p in self._moving], self._steps
        self._moving, self._steps = [], []
        before = flat_copy(weights, weights)[1] if weights else []
        try:
            if weights:
                torch._foreach_add_(weights, steps)
            del steps
            torch.clear_autocast_cache()  # it may hold casts of the weights as they were
            yield
        finally:
            if weights:
                torch._foreach_copy_(weights, before)
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

    def _sizes(self, moved: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        named = {name: p for name, p in moved.items() if _is_weight(name)}
        if not named:
            return {}
        sizes = torch._foreach_abs(list(named.values()))
        torch._foreach_add_(sizes, self.eta)
        return dict(zip(named, sizes))


class RelativeWeights(Weights):
    """Takes AWP's step (Wu et al. 2020, Section 4, with one step): gamma ||w_l|| g_l / ||g_l|| in each weight w_l.

    Each weight has a radius of its own, relative to its norm. Biases, and gamma and beta of normalisation layers, do
    not move: what has one dimension, or is not named weight, as in the authors' code. There, the gradient is that of
    adversarial images; here it is that of the batch, so that methods which attack images can be combined with it.

    Args:
        model: the network, possibly wrapped.
        gamma: radius of each weight's step, as a share of its norm, >= 0.
        global_norm: see `Weights`.

    Raises:
        ApartError: where no trainable weight has more than one dimension.
    """

    defaults: ClassVar = {"gamma": 0.005, "global_norm": False}

    def __init__(self, model: nn.Module, *, gamma: float, global_norm: bool):
        super().__init__(model, rho=0.0, global_norm=global_norm)
        self.gamma = checked_radius("gamma", gamma, "AWP's authors use 0.005 and 0.01")
        if not any(p.requires_grad for _, p in self._moved()):
            raise ApartError(
                f"{type(model).__name__} has no trainable weight of more than one dimension; use the method 'sam'."
            )

    def _moved(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in super()._moved() if p.dim() > 1 and _is_weight(name))

    def _scale(self, norms: Tensor, moved: list[Tensor]) -> Tensor:
        return safe_ratio(self.gamma * torch.stack(torch._foreach_norm(moved)), norms)


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


def _is_weight(name: str) -> bool:
    """Tell whether a parameter is a weight by its name, as the authors of ASAM and of AWP do."""
    return "weight" in name.rpartition(".")[2]


def _multiplied(
    gradients: Sequence[Tensor], moved: Mapping[str, nn.Parameter], sizes: Mapping[str, Tensor]
) -> list[Tensor]:
    """Multiply gradients of the parameters in `moved` by the sizes of those that have any."""
    found = dict(zip(moved, gradients))
    products = torch._foreach_mul([found[name] for name in sizes], list(sizes.values()))
    return list((found | dict(zip(sizes, products))).values())
