"""What a strategy moves before its second pass: BN statistics (APART) or weights (SAM).

Each perturbation lives through one call of a strategy like this:

    with perturbation.observed(samples):     # the clean pass: collect the gradient to climb
        ...forward, backward...
    perturbation.ascend()                    # move against the defender
    with perturbation.applied(samples):      # the perturbed pass; undone at the end, also by an exception
        ...forward, backward...
"""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf.bn_kernels import is_channels_last
from apart_hf.errors import ApartError
from apart_hf.perturbed_bn import replaced_forwards, supported_layers

# Share of a layer's largest |g_delta| up to which a component may be rounding noise around a structural zero (where
# only further BN layers, or a softmax, read a BN's output). Measured float32 noise is at most 6.5e-7.
DEAD_ZONE = 2e-6


class Perturbation:
    """One attacker of the min-max game (Eq. 2)."""

    defaults: ClassVar[dict[str, Any]] = {}
    #: True where `ascend` reads p.grad, so that it must hold the gradient of the clean pass alone.
    reads_weight_gradients: ClassVar[bool] = False

    def check(self, samples: int) -> None:
        """Raise ApartError where a perturbed pass over `samples` samples is impossible."""

    def observed(self, samples: int) -> AbstractContextManager[None]:
        return nullcontext()

    def ascend(self) -> None: ...

    def order(self, samples: int) -> Tensor | None:
        """An order of the samples, indices (samples,), in which the perturbed pass expects them; None: as they are."""

    def applied(self, samples: int) -> AbstractContextManager[None]:
        return nullcontext()


class BatchNormStatistics(Perturbation):
    """delta_mu, delta_sigma of every BN layer: one FGSM step of radius epsilon in L-infinity (Algorithm 1, lines 1-5).

    Layers in eval mode (frozen BN) are left alone. The deltas of all layers are slices of one tensor that this object
    holds; the model never sees them as parameters or buffers.

    Args:
        model: the network, possibly wrapped.
        epsilon: radius, a share of the batch's own mean and scale, >= 0.
        groups: n, the number of groups whose statistics are estimated apart in the perturbed pass, >= 1.
    """

    defaults: ClassVar = {"epsilon": 0.1, "groups": 16}

    def __init__(self, model: nn.Module, *, epsilon: float, groups: int):
        if not (isinstance(epsilon, (int, float)) and 0 <= epsilon < float("inf")):
            raise ApartError(f"epsilon={epsilon!r}: the radius must be a finite number >= 0 (the paper uses 0.1).")
        if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
            raise ApartError(f"groups={groups!r}: the number of groups must be an integer >= 1.")
        self.model, self.epsilon, self.groups = model, epsilon, groups
        self.layers = supported_layers(model)
        self._deltas = self._leaves = self._fixed = None

    def check(self, samples: int) -> None:
        if samples % self.groups:
            divisors = [n for n in range(1, samples + 1) if samples % n == 0]
            raise ApartError(
                f"groups={self.groups} does not divide the {samples} samples of the perturbed pass; choose groups "
                f"from {', '.join(map(str, divisors))}, or another batch size or ratio."
            )

    def _active(self) -> dict[str, _BatchNorm]:
        layers = {name: layer for name, layer in self.layers.items() if layer.training}
        if not layers:
            raise ApartError(
                "every BatchNorm layer is in eval mode, so there are no batch statistics to perturb; "
                "call model.train(), or use the method 'standard' to fine-tune with frozen BatchNorm."
            )
        return layers

    def _allocate(self) -> None:
        """One tensor of zeros for all deltas, sliced into a differentiable (delta_mu, delta_sigma) per layer."""
        parameter = next(self.model.parameters())
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if self._deltas is None or (self._deltas.device, self._deltas.dtype) != (parameter.device, dtype):
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

    def observed(self, samples: int) -> AbstractContextManager[None]:
        self._allocate()
        return replaced_forwards(self._active(), self._leaves, samples=samples, perturbed=False)

    def _gradient(self) -> Tensor:
        """g_delta of all layers, (sum of 2C,), summed over the ranks: one global attack, as in the authors' code."""
        pairs = self._leaves.values()
        gradient = torch.cat([torch.zeros_like(x) if x.grad is None else x.grad for pair in pairs for x in pair])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(gradient)
        return gradient

    @torch.no_grad()
    def ascend(self) -> None:
        gradient = self._gradient()
        size = gradient.abs()
        largest = size.new_zeros(len(self.layers)).scatter_reduce_(0, self._layer_of, size, "amax")
        # comparisons with NaN or inf bounds are false: an overflow gives no sign
        counts = size > DEAD_ZONE * largest[self._layer_of]
        self._deltas.copy_(torch.where(counts, self.epsilon * gradient.sign(), 0.0))

    def _in_blocks(self) -> bool:
        """Whether groups are laid out as runs of samples: cheaper where channels lie innermost, on the CPU."""
        return self.groups > 1 and any(p.device.type == "cpu" and is_channels_last(p) for p in self.model.parameters())

    def order(self, samples: int) -> Tensor | None:
        if self._in_blocks():
            return torch.arange(samples).view(-1, self.groups).t().flatten()
        return None

    def applied(self, samples: int) -> AbstractContextManager[None]:
        return replaced_forwards(
            self._active(), self._fixed, samples=samples, groups=self.groups, blocks=self._in_blocks(), perturbed=True
        )


class Weights(Perturbation):
    """SAM's step in the weights: phi + rho * g / ||g||_2, over all trainable parameters (Eq. 7 with p = 2).

    Args:
        model: the network, possibly wrapped.
        rho: radius in the weights' own units, >= 0.
    """

    defaults: ClassVar = {"rho": 0.05}
    reads_weight_gradients = True

    def __init__(self, model: nn.Module, *, rho: float):
        if not (isinstance(rho, (int, float)) and 0 <= rho < float("inf")):
            raise ApartError(f"rho={rho!r}: the radius must be a finite number >= 0 (the paper uses 0.05 to 0.2).")
        self.model, self.rho = model, rho
        self._steps: list[tuple[nn.Parameter, Tensor]] = []

    @torch.no_grad()
    def ascend(self) -> None:
        """Compute the step. A zero or non-finite gradient gives none."""
        moved = [p for p in self.model.parameters() if p.requires_grad and p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in moved])))
        usable = norm.isfinite() & (norm > 0)
        scale = torch.where(usable, self.rho / norm, 0.0)
        self._steps = [(p, torch.where(usable, p.grad * scale, 0.0)) for p in moved]

    @contextmanager
    def applied(self, samples: int):
        # put back by copy: adding and subtracting the step would leave rounding errors, different on each rank
        before = [(p, p.detach().clone()) for p, _ in self._steps]
        try:
            with torch.no_grad():
                for p, step in self._steps:
                    p.add_(step)
            self._steps = []
            torch.clear_autocast_cache()  # it may hold casts of the weights as they were
            yield
        finally:
            self._steps = []
            with torch.no_grad():
                for p, value in before:
                    p.copy_(value)
            torch.clear_autocast_cache()
