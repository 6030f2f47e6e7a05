"""The strategy of a method: what a training loop is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Unpack, overload

import torch
from torch import nn

from apart_hf.strategies import hyper_parameters as declared
from apart_hf.strategies.checks import check_model
from apart_hf.strategies.hyper_parameters import MethodName
from apart_hf.strategies.methods import chosen_method
from apart_hf.strategies.perturbation import Perturbation
from apart_hf.strategies.two_pass import TwoPassStrategy


@overload
def create_strategy(
    name: Literal["standard"], model: nn.Module, **options: Unpack[declared.Standard]
) -> TwoPassStrategy: ...
@overload
def create_strategy(name: Literal["apart"], model: nn.Module, **options: Unpack[declared.Apart]) -> TwoPassStrategy: ...
@overload
def create_strategy(
    name: Literal["sam", "sam-on"], model: nn.Module, **options: Unpack[declared.Sam]
) -> TwoPassStrategy: ...
@overload
def create_strategy(name: Literal["asam"], model: nn.Module, **options: Unpack[declared.Asam]) -> TwoPassStrategy: ...
@overload
def create_strategy(
    name: Literal["apart-sam"], model: nn.Module, **options: Unpack[declared.ApartSam]
) -> TwoPassStrategy: ...
@overload
def create_strategy(
    name: Literal["apart-asam"], model: nn.Module, **options: Unpack[declared.ApartAsam]
) -> TwoPassStrategy: ...
@overload
def create_strategy(name: Literal["gsam"], model: nn.Module, **options: Unpack[declared.Gsam]) -> TwoPassStrategy: ...
@overload
def create_strategy(name: Literal["awp"], model: nn.Module, **options: Unpack[declared.Awp]) -> TwoPassStrategy: ...
@overload
def create_strategy(
    name: Literal["random-bn"], model: nn.Module, **options: Unpack[declared.RandomBN]
) -> TwoPassStrategy: ...
@overload
def create_strategy(
    name: Literal["ghost-bn"], model: nn.Module, **options: Unpack[declared.GhostBN]
) -> TwoPassStrategy: ...
@overload
def create_strategy(
    name: Literal["advprop"], model: nn.Module, **options: Unpack[declared.AdvProp]
) -> TwoPassStrategy: ...
@overload
def create_strategy(
    name: Literal["fast-advprop"], model: nn.Module, **options: Unpack[declared.FastAdvProp]
) -> TwoPassStrategy: ...
@overload
def create_strategy(name: Literal["advbn"], model: nn.Module, **options: Unpack[declared.AdvBN]) -> TwoPassStrategy: ...
@overload
def create_strategy(
    name: Literal["apart-advprop"], model: nn.Module, **options: Unpack[declared.ApartAdvProp]
) -> TwoPassStrategy: ...
@overload
def create_strategy(
    name: Sequence[MethodName | Perturbation],
    model: nn.Module,
    *,
    keeps_clean_gradient: bool = True,
    accelerator: declared.HasBackward | None = None,
    generator: torch.Generator | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    every: int = 1,
    uneven: declared.Uneven = "error",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    **hyper: Any,
) -> TwoPassStrategy: ...
def create_strategy(
    name: str | Sequence[str | Perturbation],
    model: nn.Module,
    *,
    keeps_clean_gradient: bool | None = None,
    accelerator: declared.HasBackward | None = None,
    generator: torch.Generator | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    every: int = 1,
    uneven: declared.Uneven = "error",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    **hyper: Any,
) -> TwoPassStrategy:
    """Make what fills `p.grad` for one batch, by a method's name: APART (Algorithm 1), SAM, both, or a plain step.

    The strategy takes the place of `loss.backward()` in a training loop; optimizer, scheduler and model stay as they
    are. Type checkers know which hyper-parameters each method has.

    Args:
        name: one of `list_strategies()`. Or a list of such names, which lend their perturbations, and of `Perturbation`
            objects of your own, made for this model: all are applied at once.
        model: the network; may be wrapped (DDP, compiled). After `accelerator.prepare`, where that is used.
        keeps_clean_gradient: of a list alone, where it is True by default; see `Method`.
        accelerator: an `accelerate.Accelerator`; its `backward` is then the default backward.
        generator: draws the samples of the second pass where ratio < 1, and random-bn's signs. None: torch's global
            generator.
        autocast: makes the context of the two forwards and their losses; the backwards stay outside of it.
        every: the second pass is made in each so-manieth step, the others are plain steps. Steps are counted by the
            strategy: each call is one, or, with an accelerator that accumulates, all up to its synchronisation.
        uneven: what becomes of a batch that groups or ratio do not fit, such as the last one of an epoch. "error": it
            is refused. "plain": it takes an ordinary pass. "fit": it takes the largest number of groups, and of samples
            in the second pass, that fits it. What was done is logged once.
        mean, std: what images are normalised by, for methods that move pixels: a number, or one for each channel in a
            list, array or tensor. None: as the model's `pretrained_cfg` says.
        **hyper: the method's hyper-parameters (`METHODS[name].hyper_parameters()` has their defaults):

            - epsilon: radius of the statistics' perturbation, as a share of the batch's own mean and scale, >= 0.
            - groups: n, parts of the second batch that are normalised apart, >= 1; it divides N.
            - ratio: N/M, the share of the batch in the second pass, in (0, 1]; N is a whole number.
            - rho: radius of the weights' perturbation in the L2 norm, >= 0.
            - eta: what keeps asam's scale of small weights from zero, >= 0.
            - pixel_epsilon, pixel_step, steps: radius, and size of a step, of the images' perturbation, in units of
              1/255, in [0, 255]; and the number of steps, >= 1.
            - random_start: whether that perturbation begins at random, which takes one more pass.
            - aux_affine: whether auxiliary BN has a gamma and beta of its own; see `TwoPassStrategy.parameters`.
            - layer, step_size: whose features advbn perturbs, by name or "auto" for the first stage, and the size of a
              step; its epsilon is a share of their mean and deviation.
            - gamma: radius of awp's step in each weight, as a share of the weight's norm, >= 0.
            - alpha: share of the clean gradient's part that is orthogonal to the perturbed one, in gsam, >= 0.
            - local_attack, global_norm: with several processes, whether each attacks the statistics by the gradient of
              its own batch, and whether all climb the mean of their weights' gradients.

    Returns:
        The strategy; `accumulate_gradients` is its step.

    Raises:
        ApartError: (a ValueError) for an unknown method or hyper-parameter, a value out of range, or a model that the
            method does not take: without the layers that it perturbs, with a BN class that has a forward of its own,
            sharded, in DataParallel, or not wrapped yet where several processes train. For what is no model, too.

    Example:
        >>> import timm, torch
        >>> from apart_hf import Perturbation, create_strategy
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> strategy = create_strategy("apart", model, epsilon=0.1, groups=4)
        >>> images, targets = torch.randn(8, 3, 32, 32), torch.arange(8)
        >>> loss, output = strategy.accumulate_gradients(images, targets, torch.nn.CrossEntropyLoss())
        >>> optimizer.step(); optimizer.zero_grad()
        >>> strategy, tuple(output.shape)
        (apart(epsilon=0.1, groups=4, ratio=1.0), (8, 10))
        >>> class Noise(Perturbation):
        ...     pass  # `Perturbation` says what to define
        >>> create_strategy(["apart", Noise(model)], model, groups=4)
        apart+Noise(epsilon=0.1, groups=4, ratio=1.0)
    """
    title, method = chosen_method(name, model, hyper, keeps_clean_gradient)
    check_model(model, accelerator)
    return TwoPassStrategy(
        title,
        method,
        model,
        method.hyper_parameters() | hyper,
        accelerator=accelerator,
        generator=generator,
        autocast=autocast,
        every=every,
        uneven=uneven,
        mean=mean,
        std=std,
    )
