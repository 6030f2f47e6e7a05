"""Accuracy under shifted BN statistics: the numbers of Figures 1 and 2 of the paper. Models are left as they were."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf.batchnorm.patching import supported_layers
from apart_hf.data import IGNORED
from apart_hf.errors import ApartError
from apart_hf.strategies.bn_perturbations import (
    AdversarialStatistics,
    GroupStatistics,
    RandomStatistics,
    UniformStatistics,
)
from apart_hf.strategies.scalars import checked_radius

STATISTICS = ("mean", "std")
Batches = Iterable[tuple[Tensor, Tensor]]
Case = tuple[dict[str, Any], Callable[[Tensor], Tensor]]  # what a row says of it; images to logits
RANDOM = {"uniform": UniformStatistics, "signs": RandomStatistics}


def attack(
    model: nn.Module,
    batches: Batches,
    *,
    batch_size: int,
    epsilons: Sequence[float],
    groups: Sequence[int] = (1, 2, 4, 8, 16),
    draws: int = 3,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure accuracy after APART's first step on one batch, beside random perturbations (Section 4.4, Figure 1).

    The first batch gives g_delta by the cross-entropy, and with it delta = epsilon * sign(g_delta) for every radius
    (Algorithm 1, lines 1-5). Then all batches, that one included, are classified by Eq. 3 with this delta: each of the
    `groups` parts of a batch is normalised by its own statistics, as in lines 7-11; running statistics play no part.
    Uniform noise and random signs are for one group. All else, such as dropout, is in eval mode.

    Args:
        model: with BatchNorm; left as it is.
        batches: (images, class indices) in random order. Only batches of `batch_size` decoded images are used, so that
            all statistics are of equally many: an incomplete last one is left out.
        batch_size: images in a batch.
        epsilons: radii, as a share of the batch's own mean and scale, >= 0.
        groups: numbers of groups, each a divisor of `batch_size`.
        draws: of either random perturbation; draw d is seeded by `seed` + d, for every radius alike.
        seed: of the draws.

    Returns:
        Rows with perturbation ("apart", "uniform" or "signs"), groups, epsilon, draw, images, top1 (per cent).

    Raises:
        ApartError: where a value is out of range, there is no whole batch, or the model has no BatchNorm.
    """
    network = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in supported_layers(network).values():
        layer.training = True  # .train() would turn on the dropout within a BatchNormAct2d
    for n in groups:
        GroupStatistics(network, groups=n).check(batch_size)
    _check_radii(epsilons)
    whole = (batch for batch in batches if int((batch[1] != IGNORED).sum()) == batch_size)
    first = next(whole, None)
    if first is None:
        raise ApartError(f"there is no batch of {batch_size} images; take more images, or a smaller batch.")
    adversary = AdversarialStatistics(network, epsilon=0.0, groups=1, local_attack=False)
    with adversary.observed(batch_size):
        nn.functional.cross_entropy(network(first[0]), first[1]).backward()
    curves = [("apart", adversary, n, 0) for n in groups] + [
        (name, kind(network, epsilon=0.0, groups=1), 1, draw) for name, kind in RANDOM.items() for draw in range(draws)
    ]
    return _accuracies(
        chain([first], whole),
        [
            (
                {"perturbation": name, "groups": n, "epsilon": epsilon, "draw": draw},
                partial(_shifted, perturbation, n, epsilon, seed + draw),
            )
            for name, perturbation, n, draw in curves
            for epsilon in epsilons
        ],
    )


def _shifted(
    perturbation: AdversarialStatistics | RandomStatistics, groups: int, epsilon: float, seed: int, images: Tensor
) -> Tensor:
    """Compute logits; the direction of delta depends on the first step, or the seed, alone."""
    perturbation.groups, perturbation.epsilon = groups, epsilon
    perturbation.ascend(torch.Generator().manual_seed(seed))
    with perturbation.applied(len(images)):
        return perturbation.model(images)


def robustness(
    model: nn.Module, batches: Batches, *, epsilons: Sequence[float], draws: int = 1, seed: int = 0
) -> list[dict[str, Any]]:
    """Measure accuracy in eval mode with scaled running statistics (Section 4.5, Figure 2); see `scaled_statistics`.

    Args:
        model: with BatchNorm; left as it is.
        batches: (images, class indices).
        epsilons: radii, as a share of the running mean or standard deviation, in [0, 1).
        draws: directions; draw d is seeded by `seed` + d, for every radius alike.
        seed: of the directions.

    Returns:
        Rows with statistic ("mean" or "std"), epsilon, draw, images, top1 (per cent).

    Raises:
        ApartError: where a value is out of range, or the model has no BatchNorm or no running statistics.
    """
    network = copy.deepcopy(model).eval()
    layers = supported_layers(network)
    for name, layer in layers.items():
        _running_statistics(name, layer)
    _check_radii(epsilons, below=1)
    return _accuracies(
        batches,
        [
            (
                {"statistic": statistic, "epsilon": epsilon, "draw": draw},
                partial(functional_call, network, scaled_statistics(layers, statistic, epsilon, seed + draw)),
            )
            for statistic in STATISTICS
            for draw in range(draws)
            for epsilon in epsilons
        ],
    )


def scaled_statistics(layers: Mapping[str, _BatchNorm], statistic: str, epsilon: float, seed: int) -> dict[str, Tensor]:
    """Scale buffers: running means mu to (1 + epsilon v) mu, or variances such that sigma is (1 + epsilon v) sigma.

    sigma is what a layer divides by, sqrt(var + eps). v of {-1, 1}^C is drawn for each layer and statistic, by `seed`
    and the widths of the layers alone: models of one architecture get the same. statistic: "mean" or "std".
    """
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, layer in layers.items():
        signs = 2 * torch.randint(2, (len(STATISTICS), layer.num_features), generator=generator) - 1
        mean, var = _running_statistics(name, layer)
        shift = epsilon * signs[STATISTICS.index(statistic)].to(mean)
        if statistic == "mean":
            found[f"{name}.running_mean"] = (1 + shift) * mean
        else:  # (1 + shift)^2 (var + eps) - eps, but exact at shift 0
            found[f"{name}.running_var"] = var + shift * (2 + shift) * (var + layer.eps)
    return found


def _running_statistics(name: str, layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    if layer.running_mean is None or layer.running_var is None:
        raise ApartError(f"BatchNorm layer {name!r} keeps no running statistics, so there is nothing to perturb.")
    return layer.running_mean, layer.running_var


def _check_radii(epsilons: Sequence[float], below: float = math.inf) -> None:
    for epsilon in epsilons:
        if checked_radius("epsilon", epsilon, "the paper trains with 0.1") >= below:
            raise ApartError(f"epsilon={epsilon}: standard deviations are scaled by 1 - epsilon; choose radii below 1.")


@torch.no_grad()
def _accuracies(batches: Batches, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Measure every case, a row each, by a single pass over the batches."""
    hits: list[Tensor] = []
    seen = 0
    for images, targets in batches:
        hits.append(torch.stack([(logits_of(images).argmax(-1) == targets).sum() for _, logits_of in cases]))
        seen += int((targets != IGNORED).sum())
    if not seen:
        raise ApartError("there is no image that can be decoded.")
    total = torch.stack(hits).sum(0).tolist()
    return [{**columns, "images": seen, "top1": 100 * hit / seen} for (columns, _), hit in zip(cases, total)]
