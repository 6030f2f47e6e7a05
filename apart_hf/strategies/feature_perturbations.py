"""Perturbed features: mean and deviation of the output of one layer, moved by projected gradient ascent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from apart_hf.errors import ApartError, unknown_name, written
from apart_hf.strategies.bn_perturbations import DEAD_ZONE
from apart_hf.strategies.perturbation import Perturbation
from apart_hf.strategies.scalars import checked_count, checked_radius
from apart_hf.strategies.wrapping import unwrapped

FIRST_STAGE = "auto"


class FeatureStatistics(Perturbation):
    """Attacks as AdvBN does (Shu et al. 2021, Section 3): by PGD in L-infinity on the statistics of one layer's output.

    The features x become x + delta_sigma (x - mu) + delta_mu mu, with mu the mean of each channel over the batch:
    their mean is (1 + delta_mu) mu and their deviation (1 + delta_sigma) sigma, as in the authors' `perturb`. Each of
    `steps` times, delta <- clip(delta + step_size * sign(g)) to |delta| <= epsilon. The first g is that of the clean
    pass, so that there are `steps` - 1 further passes. Features that are nowhere negative (behind ReLU) stay so, as in
    the authors' code for ResNets.

    It differs from that code in four things. Weights before the layer are trained, unless they are frozen, and the
    gradient goes through mu. The two losses have the mean of Algorithm 1 and not the sum, which is half of the learning
    rate. The attack is in train mode, by batch statistics. Where |g| is within rounding of zero, its sign is 0.

    Args:
        model: the network, possibly wrapped.
        layer: name of a module whose output is a tensor; "auto": the first stage, as `model.feature_info` tells it. Its
            channels are dimension 1; or the last where no convolution or BatchNorm gives the output and it has three
            dimensions (tokens), or four in a network whose `output_fmt` is NHWC (Swin).
        epsilon: radius, a share of the features' own mean and deviation, >= 0.
        step_size: of each step, in the same units, >= 0.
        steps: of the ascent, >= 1.

    Raises:
        ApartError: for a value out of range, and for a layer that is not there.

    Example:
        >>> import timm, torch
        >>> from apart_hf import create_strategy
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> strategy = create_strategy("advbn", model, steps=2)
        >>> images, targets = torch.rand(8, 3, 32, 32), torch.arange(8)
        >>> loss, _ = strategy.accumulate_gradients(images, targets, torch.nn.CrossEntropyLoss())
        >>> strategy.perturbations[0].name, round(float(strategy.figures()["feature_delta"]), 4)
        ('layer1', 0.4)
    """

    defaults: ClassVar = {"layer": FIRST_STAGE, "epsilon": 1.1, "step_size": 0.2, "steps": 6}
    counts_samples = False
    fixed = frozenset({"layer"})

    def __init__(self, model: nn.Module, *, layer: str, epsilon: float, step_size: float, steps: int):
        self.model, self.layer = model, layer
        self.epsilon = checked_radius("epsilon", epsilon, "AdvBN's authors use 1.1")
        self.step_size = checked_radius("step_size", step_size, "AdvBN's authors use 0.2", what="size of a step")
        self.steps = checked_count("steps", steps, "steps of the ascent")
        self.name, self.module = find_layer(model, layer)
        self.module = _last_of(self.module, unwrapped(model))
        self._channels_last = str(getattr(unwrapped(model), "output_fmt", "")).endswith("NHWC")
        self._leaves: list[Tensor] = []  # delta_mu and delta_sigma, (C,) each
        self._climbs = False

    @contextmanager
    def _perturbed(self, climbs: bool) -> Iterator[None]:
        for leaf in self._leaves:
            leaf.requires_grad_(climbs)
        self._climbs = climbs

        # the leaves are made in the first call, when the number of channels is known
        @torch.compiler.disable
        def perturb(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            return self._moved(output)

        handle = self.module.register_forward_hook(perturb)
        try:
            yield
        finally:
            handle.remove()

    def observed(self, samples: int) -> Any:
        self._leaves = []
        return self._perturbed(True)

    def climbing(self, samples: int) -> Any:
        return self._perturbed(True)

    def applied(self, samples: int) -> Any:
        return self._perturbed(False)

    def _moved(self, output: Any) -> Tensor:
        """Perturb the features; at delta = 0 they are the same, bit for bit."""
        if not isinstance(output, Tensor) or output.dim() < 2 or not output.is_floating_point():
            raise ApartError(
                f"layer={self.layer!r}: the output of {self.name!r} is no tensor of features; name a layer whose is."
            )
        channels = self._channels(output)
        if not self._leaves:
            dtype, width = torch.promote_types(output.dtype, torch.float32), output.shape[channels]
            leaves = (output.new_zeros(width, dtype=dtype) for _ in ("mu", "sigma"))
            self._leaves = [leaf.requires_grad_(self._climbs) for leaf in leaves]
        shape = [-1 if d == channels else 1 for d in range(output.dim())]
        delta_mu, delta_sigma = (leaf.to(output.dtype).view(shape) for leaf in self._leaves)
        mu = output.mean([d for d in range(output.dim()) if d != channels], keepdim=True)
        moved = output + delta_sigma * (output - mu) + delta_mu * mu
        floor = torch.where(output.amin() >= 0, 0.0, -torch.inf).to(output.dtype)
        return torch.where(moved < floor, floor, moved)

    def _channels(self, output: Tensor) -> int:
        """Tell which dimension of the features is that of the channels."""
        innermost = output.dim() == 3 or (output.dim() == 4 and self._channels_last)
        return output.dim() - 1 if innermost and not isinstance(self.module, (_ConvNd, _BatchNorm)) else 1

    @torch.no_grad()
    def ascend(self, generator: torch.Generator | None = None) -> None:
        if not self._leaves:
            raise ApartError(f"layer={self.layer!r}: {self.name!r} was not called in the pass; name one that is used.")
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves]
        bound = DEAD_ZONE * torch.stack(gradients).abs().amax()
        signs = (torch.where(gradient.abs() > bound, gradient.sign(), 0.0) for gradient in gradients)
        moved = (leaf.detach() + self.step_size * sign for leaf, sign in zip(self._leaves, signs))
        self._leaves = [leaf.clamp_(-self.epsilon, self.epsilon) for leaf in moved]

    def figures(self) -> dict[str, Tensor]:
        """Return the mean of |delta|."""
        if not self._leaves:
            return {"feature_delta": torch.tensor(float("nan"))}
        return {"feature_delta": torch.cat(self._leaves).detach().abs().mean()}


def find_layer(model: nn.Module, layer: Any) -> tuple[str, nn.Module]:
    """Find the layer of a network by its name within it, as it is without wrappers.

    Args:
        model: the network, possibly wrapped.
        layer: the name; "auto": the first stage. It is that of `feature_info` which is the first to be reduced four
            times, as the first stage of a ResNet is; or the first of all, in networks that begin without a reduction.

    Raises:
        ApartError: where there is none of that name.
    """
    network = unwrapped(model)
    names = {name: module for name, module in network.named_modules() if name}
    if not isinstance(layer, str):
        raise ApartError(f"layer={written(layer)}: the layer is named, for instance layer='layer1'.")
    if layer == FIRST_STAGE:
        layer = _first_stage(network)
        if layer not in names:
            raise ApartError(
                f"layer='{FIRST_STAGE}': {type(network).__name__} has no feature_info that tells its first stage; name "
                f"one of its {len(names)} layers."
            )
    if layer not in names:
        raise unknown_name("layer", layer, names)
    return layer, names[layer]


def _last_of(module: nn.Module, network: nn.Module) -> nn.Module:
    """Return what gives the output of a sequence: its last layer, which timm's checkpointing calls by itself."""
    held = [child for parent in network.modules() for child in parent._modules.values()]
    while type(module) is nn.Sequential and len(module) and sum(child is module[-1] for child in held) == 1:
        module = module[-1]
    return module


def _first_stage(network: nn.Module) -> str | None:
    for prefix, part in network.named_modules():
        stages = [dict(one) for one in getattr(part, "feature_info", None) or ()]
        if stages and all("module" in one for one in stages):
            reduced = (one for one in stages if one.get("reduction", 4) >= 4)
            first = stages[0] if stages[0].get("reduction") == 1 else next(reduced, stages[0])
            return f"{prefix}.{first['module']}" if prefix else str(first["module"])
    return None
