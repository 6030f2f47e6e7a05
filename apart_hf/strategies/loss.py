"""A method as a loss, by name: for training loops that own the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack, overload

import torch
from torch import nn

from apart_hf.strategies import hyper_parameters as declared
from apart_hf.strategies.perturbation import Perturbation
from apart_hf.strategies.two_pass_loss import Batch, Result, TwoPassLoss


@overload
def create_loss(
    name: Literal["standard"],
    model: nn.Module,
    loss_fn: Callable[[Any, Batch], Result],
    **options: Unpack[declared.LossOptions],
) -> TwoPassLoss[Batch, Result]: ...
@overload
def create_loss(
    name: Literal["apart"],
    model: nn.Module,
    loss_fn: Callable[[Any, Batch], Result],
    **options: Unpack[declared.ApartLoss],
) -> TwoPassLoss[Batch, Result]: ...
@overload
def create_loss(
    name: Literal["sam", "sam-on"],
    model: nn.Module,
    loss_fn: Callable[[Any, Batch], Result],
    **options: Unpack[declared.SamLoss],
) -> TwoPassLoss[Batch, Result]: ...
@overload
def create_loss(
    name: Literal["asam"],
    model: nn.Module,
    loss_fn: Callable[[Any, Batch], Result],
    **options: Unpack[declared.AsamLoss],
) -> TwoPassLoss[Batch, Result]: ...
@overload
def create_loss(
    name: Literal["apart-sam"],
    model: nn.Module,
    loss_fn: Callable[[Any, Batch], Result],
    **options: Unpack[declared.ApartSamLoss],
) -> TwoPassLoss[Batch, Result]: ...
@overload
def create_loss(
    name: Literal["apart-asam"],
    model: nn.Module,
    loss_fn: Callable[[Any, Batch], Result],
    **options: Unpack[declared.ApartAsamLoss],
) -> TwoPassLoss[Batch, Result]: ...
@overload
def create_loss(
    name: Literal["gsam"],
    model: nn.Module,
    loss_fn: Callable[[Any, Batch], Result],
    **options: Unpack[declared.GsamLoss],
) -> TwoPassLoss[Batch, Result]: ...
@overload
def create_loss(
    name: Literal["awp"], model: nn.Module, loss_fn: Callable[[Any, Batch], Result], **options: Unpack[declared.AwpLoss]
) -> TwoPassLoss[Batch, Result]: ...
@overload
def create_loss(
    name: Literal["random-bn"],
    model: nn.Module,
    loss_fn: Callable[[Any, Batch], Result],
    **options: Unpack[declared.RandomBNLoss],
) -> TwoPassLoss[Batch, Result]: ...
@overload
def create_loss(
    name: Literal["ghost-bn"],
    model: nn.Module,
    loss_fn: Callable[[Any, Batch], Result],
    **options: Unpack[declared.GhostBNLoss],
) -> TwoPassLoss[Batch, Result]: ...
@overload
def create_loss(
    name: Literal["advprop"],
    model: nn.Module,
    loss_fn: Callable[[Any, Batch], Result],
    **options: Unpack[declared.AdvPropLoss],
) -> TwoPassLoss[Batch, Result]: ...
@overload
def create_loss(
    name: Literal["fast-advprop"],
    model: nn.Module,
    loss_fn: Callable[[Any, Batch], Result],
    **options: Unpack[declared.FastAdvPropLoss],
) -> TwoPassLoss[Batch, Result]: ...
@overload
def create_loss(
    name: Literal["advbn"],
    model: nn.Module,
    loss_fn: Callable[[Any, Batch], Result],
    **options: Unpack[declared.AdvBNLoss],
) -> TwoPassLoss[Batch, Result]: ...
@overload
def create_loss(
    name: Literal["apart-advprop"],
    model: nn.Module,
    loss_fn: Callable[[Any, Batch], Result],
    **options: Unpack[declared.ApartAdvPropLoss],
) -> TwoPassLoss[Batch, Result]: ...
@overload
def create_loss(
    name: Sequence[declared.MethodName | Perturbation],
    model: nn.Module,
    loss_fn: Callable[[Any, Batch], Result],
    *,
    keeps_clean_gradient: bool = True,
    generator: torch.Generator | None = None,
    every: int = 1,
    uneven: declared.Uneven = "error",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    **hyper: Any,
) -> TwoPassLoss[Batch, Result]: ...
def create_loss(
    name: str | Sequence[str | Perturbation],
    model: nn.Module,
    loss_fn: Callable[[Any, Batch], Result],
    *,
    keeps_clean_gradient: bool | None = None,
    generator: torch.Generator | None = None,
    every: int = 1,
    uneven: declared.Uneven = "error",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    **hyper: Any,
) -> TwoPassLoss[Batch, Result]:
    """Make a loss whose `backward` adds a method's gradient to p.grad: APART, SAM, both, or a plain one.

    Both passes run when the loss is computed. What comes back is the loss of the clean pass, and its `backward` adds
    the method's gradient times whatever was done to the loss: its division by the batches that accumulate, a gradient
    scaler's factor, a weight. So it suits loops and trainers that call `backward` by themselves, in autocast, with
    accumulation, under accelerate and under DistributedDataParallel. In eval mode and under torch.no_grad it is the
    plain loss. Losses whose backward is called together add up; a second backward of one is an error, as always
    in torch, unless retain_graph=True kept the first.

    Args:
        name: one of `list_strategies()`, or a list of names and of `Perturbation` objects, see `create_strategy`.
        model: the network; may be wrapped (DDP, compiled). After `accelerator.prepare`, where that is used.
        loss_fn: loss_fn(model, batch) -> loss, or (loss, aux). The loss is a scalar, the *mean* over the samples of the
            batch, computed by the model that loss_fn is given, which is the network within DDP. It is called once in
            each pass, so that what it logs is logged twice.
        keeps_clean_gradient: of a list alone, see `create_strategy`.
        generator: draws the samples of the second pass where ratio < 1, and random-bn's signs. None: torch's global
            generator.
        every: the second pass is made in each so-manieth step, the others are plain steps. A step is a call in
            training, unless that is given ends_step=False.
        uneven: "error", "plain" or "fit", for batches that groups or ratio do not fit; see `create_strategy`.
        mean, std: what images are normalised by, see `create_strategy`.
        **hyper: the method's hyper-parameters, see `create_strategy`.

    Returns:
        A function of the batch, which gives what loss_fn returns: loss, or (loss, aux) with aux detached.

    Raises:
        ApartError: as `create_strategy` does, and where loss_fn is no function.

    Example:
        >>> import timm, torch
        >>> from apart_hf import create_loss
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def loss_fn(model, batch):
        ...     logits = model(batch["pixel_values"])
        ...     return torch.nn.functional.cross_entropy(logits, batch["labels"]), logits
        >>> compute_loss = create_loss("apart", model, loss_fn, epsilon=0.1, groups=4)
        >>> batch = {"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.arange(8)}
        >>> loss, logits = compute_loss(batch)
        >>> loss.backward()
        >>> optimizer.step(); optimizer.zero_grad()
    """
    options: dict[str, Any] = {"generator": generator, "every": every, "uneven": uneven, "mean": mean, "std": std}
    return TwoPassLoss(name, model, loss_fn, keeps_clean_gradient=keeps_clean_gradient, hyper=hyper, **options)
