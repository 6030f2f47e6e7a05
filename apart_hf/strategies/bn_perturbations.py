"""Perturbed batch statistics: delta_mu and delta_sigma of every BN layer, and groups of samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf.batchnorm.layouts import is_channels_last
from apart_hf.batchnorm.patching import check_present, replaced_forwards, supported_layers
from apart_hf.batchnorm.shared import Shared
from apart_hf.errors import ApartError
from apart_hf.strategies.machine import draw_device, processes
from apart_hf.strategies.perturbation import Perturbation
from apart_hf.strategies.scalars import checked_count, checked_option, checked_radius

# Share of a layer's largest |g_delta| up to which a component counts as rounding noise around a structural zero: where
# only further BN layers, or a softmax, read a BN's output. By scripts/noise_floor.py, see docs/NUMERICS.md: the largest
# noise in float32 is about 1e-6; with float16 or bfloat16 activations 99 % of it end near a quarter of their eps.
DEAD_ZONE = 2e-6
DEAD_ZONE_IN_16_BITS = 0.25  # of the dtype's eps


@lru_cache(maxsize=16)
def _by_groups(samples: int, groups: int, device: torch.device) -> Tensor:
    """Return the samples in the order of their groups: sample i is in group i mod groups."""
    return torch.arange(samples, device=device).view(-1, groups).t().flatten()


def _unallocated() -> dict[str, Any]:
    """Return what holds the deltas, as it is before the first step."""
    indices = torch.empty(0, dtype=torch.int64)
    return {"_deltas": torch.empty(0), "_layer_of": indices, "_leaves": {}, "_fixed": {}}


class GroupStatistics(Perturbation):
    """Perturbs nothing but the groups: the second pass normalises each by its own statistics (ghost BN).

    Layers in eval mode (frozen BN) are left alone. The deltas of all layers are slices of one tensor that this object
    holds; the model never sees them as parameters or buffers. Here they are zero.

    Args:
        model: the network, possibly wrapped.
        groups: n, the number of groups whose statistics are estimated apart in the perturbed pass, >= 1.
    """

    defaults: ClassVar = {"groups": 16}
    applied_last = True
    replaces_statistics = True

    def __init__(self, model: nn.Module, *, groups: int):
        self.model, self.groups = model, checked_count("groups", groups, "groups")
        self.layers, self._shared = supported_layers(model), Shared()
        self._deltas: Tensor
        self._layer_of: Tensor
        self._leaves: dict[str, tuple[Tensor, Tensor]]
        self._fixed: dict[str, tuple[Tensor, Tensor]]
        vars(self).update(_unallocated())  # the model may still move to another device

    def __getstate__(self) -> dict[str, Any]:
        # pickle would make tensors of their own of the slices, which the attack would then not reach
        return {**vars(self), **_unallocated()}

    def check(self, samples: int) -> None:
        if samples % self.groups:
            divisors = [n for n in range(1, samples + 1) if samples % n == 0]
            raise ApartError(
                f"groups={self.groups} does not divide the {samples} samples of the perturbed pass; choose groups "
                f"from {', '.join(map(str, divisors))}, or another batch size or ratio."
            )

    def fits(self, samples: int) -> Iterator[dict[str, Any]]:
        """Name the largest number of groups that divides the samples; then one that leaves two samples in each."""
        for groups in range(min(self.groups, samples), 0, -1):
            if samples % groups == 0:
                yield {} if groups == self.groups else {"groups": groups}
                if samples // groups > 1:
                    return

    def _active(self) -> dict[str, _BatchNorm]:
        check_present(self.model, self.layers)
        layers = {name: layer for name, layer in self.layers.items() if layer.training}
        if not layers:
            raise ApartError(
                "every BatchNorm layer is in eval mode, so there are no batch statistics to perturb; "
                "call model.train(), or use the method 'standard' to fine-tune with frozen BatchNorm."
            )
        return layers

    def _allocate(self) -> None:
        """Zero all deltas: one tensor, sliced into a differentiable (delta_mu, delta_sigma) per layer."""
        parameter = next(self.model.parameters())
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if not self._leaves or (self._deltas.device, self._deltas.dtype) != (parameter.device, dtype):
            widths = [layer.num_features for layer in self.layers.values() for _ in ("mu", "sigma")]
            self._deltas = torch.zeros(sum(widths), device=parameter.device, dtype=dtype)
            leaves = [piece.detach().requires_grad_() for piece in self._deltas.split(widths)]
            self._leaves = dict(zip(self.layers, zip(leaves[::2], leaves[1::2])))
            # the same memory without gradient; made once, since torch.compile recompiles for fresh tensors
            self._fixed = {name: (mu.detach(), sigma.detach()) for name, (mu, sigma) in self._leaves.items()}
            layer_of = [i for i, layer in enumerate(self.layers.values()) for _ in range(2 * layer.num_features)]
            self._layer_of = torch.tensor(layer_of, device=parameter.device)
        self._deltas.zero_()
        for pair in self._leaves.values():
            for leaf in pair:
                leaf.grad = None

    def ascend(self, generator: torch.Generator | None = None) -> None:
        self._allocate()

    def _in_blocks(self) -> bool:
        """Tell whether groups are runs of samples: where channels lie innermost, these need no copy."""
        return self.sorts and self.groups > 1 and any(is_channels_last(p) for p in self.model.parameters())

    def order(self, samples: int) -> Tensor | None:
        return _by_groups(samples, self.groups, next(self.model.parameters()).device) if self._in_blocks() else None

    def applied(self, samples: int) -> AbstractContextManager[None]:
        return replaced_forwards(
            self._active(),
            self._fixed,
            samples=samples,
            groups=self.groups,
            blocks=self._in_blocks(),
            perturbed=True,
            together=processes() == 1,
            shared=self._shared,
        )


class AdversarialStatistics(GroupStatistics):
    """Attacks as APART does: by one FGSM step of radius epsilon in L-infinity (Algorithm 1, lines 1-5).

    Args:
        model: the network, possibly wrapped.
        epsilon: radius, a share of the batch's own mean and scale, >= 0.
        groups: see `GroupStatistics`.
        local_attack: each process attacks by the gradient of its own batch. False: all by their sum, one global attack
            as in the authors' code.
    """

    defaults: ClassVar = {"epsilon": 0.1, "groups": 16, "local_attack": False}

    def __init__(self, model: nn.Module, *, epsilon: float, groups: int, local_attack: bool):
        super().__init__(model, groups=groups)
        self.epsilon = checked_radius("epsilon", epsilon, "the paper uses 0.1")
        self.local_attack = checked_option("local_attack", local_attack)
        self._eps = torch.zeros(())

    def observed(self, samples: int) -> AbstractContextManager[None]:
        self._allocate()
        if (self._eps.device, self._eps.dtype) != (self._deltas.device, self._deltas.dtype):
            self._eps = self._deltas.new_zeros(())
        self._eps.zero_()
        return replaced_forwards(
            self._active(),
            self._leaves,
            samples=samples,
            perturbed=False,
            shared=self._shared,
            activation_eps=self._eps,
        )

    def _gradient(self) -> Tensor:
        """Collect g_delta of all layers, (sum of 2C,)."""
        pairs = self._leaves.values()
        gradient = torch.cat([torch.zeros_like(x) if x.grad is None else x.grad for pair in pairs for x in pair])
        if processes() > 1 and not self.local_attack:
            dist.all_reduce(gradient)
        return gradient

    @torch.no_grad()
    def ascend(self, generator: torch.Generator | None = None) -> None:
        gradient = self._gradient()
        size = gradient.abs()
        largest = size.new_zeros(len(self.layers)).scatter_reduce_(0, self._layer_of, size, "amax")
        # comparisons with NaN or inf bounds are false: an overflow gives no sign
        dead_zone = (DEAD_ZONE_IN_16_BITS * self._eps).clamp(min=DEAD_ZONE)
        counts = size > dead_zone * largest[self._layer_of]
        self._deltas.copy_(torch.where(counts, self.epsilon * gradient.sign(), 0.0))

    def figures(self) -> dict[str, Tensor]:
        """Return the share of deltas, of layers that are not frozen, which the gradient gives no sign."""
        active = torch.tensor([layer.training for layer in self.layers.values()], device=self._layer_of.device)
        return {"zero_deltas": (self._deltas[active[self._layer_of]] == 0).float().mean()}


class RandomStatistics(GroupStatistics):
    """Draws random signs in the place of the gradient's: APART without its adversary. All processes draw the same.

    Args:
        model: the network, possibly wrapped.
        epsilon: radius, a share of the batch's own mean and scale, >= 0.
        groups: see `GroupStatistics`.
    """

    defaults: ClassVar = {"epsilon": 0.1, "groups": 16}

    def __init__(self, model: nn.Module, *, epsilon: float, groups: int):
        super().__init__(model, groups=groups)
        self.epsilon = checked_radius("epsilon", epsilon, "the paper uses 0.1")

    @torch.no_grad()
    def ascend(self, generator: torch.Generator | None = None) -> None:
        self._allocate()
        device = draw_device(generator, self.model)
        signs = torch.randint(2, self._deltas.shape, generator=generator, device=device).to(self._deltas) * 2 - 1
        if processes() > 1:
            dist.broadcast(signs, 0)
        self._deltas.copy_(self.epsilon * signs)


class UniformStatistics(RandomStatistics):
    """Draws uniform noise of [-epsilon, epsilon] in the place of random signs."""

    @torch.no_grad()
    def ascend(self, generator: torch.Generator | None = None) -> None:
        self._allocate()
        device = draw_device(generator, self.model)
        noise = torch.rand(self._deltas.shape, generator=generator, device=device).to(self._deltas) * 2 - 1
        self._deltas.copy_(self.epsilon * noise)
