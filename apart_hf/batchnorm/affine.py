"""What Eq. 3 has per channel: for one layer, or for all layers at once in as few operations as one layer needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Affine(NamedTuple):
    """Scales and shifts the normalised activations of a layer: weight * x_hat + bias + shift * mu/sigma.

    All are (groups * C,), group after group.

    Args:
        weight: w = gamma (1 + delta_sigma).
        bias: beta.
        shift: -w delta_mu.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor


class LayerParameters(NamedTuple):
    """Holds what the affine part of a layer is computed from; (C,) each."""

    gamma: Tensor
    beta: Tensor
    delta_mu: Tensor
    delta_sigma: Tensor


def affine_of(layer: LayerParameters, groups: int = 1) -> Affine:
    """Compute the affine part of one layer, differentiable in all of its parameters."""
    gamma, beta, delta_mu, delta_sigma = layer
    weight = (gamma * (1 + delta_sigma)).to(gamma.dtype)  # the kernels want the dtype of beta
    affine = Affine(weight, beta, -(weight * delta_mu).to(gamma.dtype))
    return affine if groups == 1 else Affine(*(vector.repeat(groups) for vector in affine))


def affine_of_all(layers: Mapping[str, LayerParameters], groups: int = 1, *, shifted: bool) -> dict[str, Affine]:
    """Compute the affine parts of all layers by operations on vectors of all of their channels.

    A device starts some twenty small kernels for them in the place of twenty for each layer.

    Args:
        layers: by name.
        groups: of the pass.
        shifted: False promises that all deltas are zero.

    Returns:
        What `affine_of` gives for each, and as differentiable.
    """
    vectors = iter(_AffineOfAll.apply(groups, shifted, *(part for layer in layers.values() for part in layer)))
    return {name: Affine(weight, bias, shift) for name, weight, bias, shift in zip(layers, *[vectors] * 3)}


class _AffineOfAll(torch.autograd.Function):
    """Concatenates layers, computes, and splits.

    Nothing is a saved tensor, so that a backward may pass here more than once, as where a loss function has a backward
    of its own. A layer whose output nobody used gets no gradient, rather than one of zeros.
    """

    @staticmethod
    def forward(ctx: Any, groups: int, shifted: bool, *parameters: Tensor) -> tuple[Tensor, ...]:
        gammas, betas, mus, sigmas = (parameters[k::4] for k in range(4))
        ctx.set_materialize_grads(False)
        ctx.groups, ctx.shifted, ctx.widths = groups, shifted, tuple(map(len, gammas))
        ctx.gamma, bias = torch.cat(gammas), torch.cat(betas)
        if shifted:
            ctx.delta_mu, ctx.scale = torch.cat(mus), torch.cat(sigmas).add_(1)
            ctx.weight = ctx.gamma * ctx.scale
            vectors = [ctx.weight, bias, -(ctx.weight * ctx.delta_mu)]
        else:
            ctx.weight = ctx.gamma
            vectors = [ctx.weight, bias, torch.zeros_like(ctx.weight)]
        if groups > 1:
            spread, _ = _places(ctx.widths, groups, bias.device)
            vectors = list(torch.stack(vectors)[:, spread].unbind())
        parts = (vector.split([groups * width for width in ctx.widths]) for vector in vectors)
        return tuple(part.to(gamma.dtype) for layer, gamma in zip(zip(*parts), gammas) for part in layer)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        used = [any(g is not None for g in gradients[k : k + 3]) for k in range(0, len(gradients), 3)]
        grad_weight, grad_bias, grad_shift = _summed_over_groups(ctx, gradients)
        of_weight = torch.addcmul(grad_weight, ctx.delta_mu, grad_shift, value=-1) if ctx.shifted else grad_weight
        needs = [any(ctx.needs_input_grad[2 + k :: 4]) for k in range(4)]
        found = [
            (of_weight * ctx.scale if ctx.shifted else of_weight) if needs[0] else None,
            grad_bias if needs[1] else None,
            -(ctx.weight * grad_shift) if needs[2] else None,
            ctx.gamma * of_weight if needs[3] else None,
        ]
        parts = [[None] * len(used) if flat is None else flat.split(ctx.widths) for flat in found]
        return (None, None, *(part if is_used else None for layer, is_used in zip(zip(*parts), used) for part in layer))


def _summed_over_groups(ctx: Any, gradients: tuple[Tensor | None, ...]) -> Iterator[Tensor]:
    """Give the gradients for weight, bias and shift of all layers, (sum of C,) each."""
    widths = [ctx.groups * width for width in ctx.widths]
    flat = torch.cat(
        [
            ctx.gamma.new_zeros(width) if gradient is None else gradient
            for k in range(3)
            for gradient, width in zip(gradients[k::3], widths)
        ]
    ).view(3, -1)
    if ctx.groups > 1:
        _, groups = _places(ctx.widths, ctx.groups, flat.device)
        flat = flat[:, groups].sum(1)
    yield from flat


@lru_cache(maxsize=16)
def _places(widths: tuple[int, ...], groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tell which channel each value of a spread vector belongs to, and where in it those of each channel are.

    A vector of all channels is layer after layer; spread, it has within each layer group after group.

    Returns:
        Places in the first, (groups * sum of C,), and in the second, (groups, sum of C).
    """
    channel_of, places, begin = [], [], 0
    for width in widths:
        channels = torch.arange(begin, begin + width)
        channel_of.append(channels.repeat(groups))
        places.append(torch.arange(groups * begin, groups * (begin + width)).view(groups, width))
        begin += width
    return torch.cat(channel_of).to(device), torch.cat(places, dim=1).to(device)
