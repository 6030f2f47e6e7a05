"""Where the first value that is not finite is: in the network, in what training carries, or in the loss alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn


def cause(
    accelerator: Accelerator,
    network: nn.Module,
    statistics: Mapping[str, Tensor],
    images: Tensor,
    loss: Tensor,
    lr: float,
) -> str:
    """Describe a step that is not finite by the process where such a value comes earliest; all processes ask together.

    Args:
        accelerator: its arithmetic is used, and its processes compare.
        network: unwrapped, with the step's gradients.
        statistics: running statistics by name.
        images: of the batch.
        loss: of its clean pass.
        lr: learning rate.

    Returns:
        Loss, learning rate, and where the first value is, in words.
    """
    with accelerator.autocast():
        rank, where = first_nonfinite(network, statistics, images)
    _, shown, where = min(gather_object([(rank, f"{loss.item():g}", where)]))
    return f"loss {shown}, learning rate {lr:g}; the first non-finite values are in {where}"


def first_nonfinite(network: nn.Module, statistics: Mapping[str, Tensor], images: Tensor) -> tuple[int, str]:
    """Find the first value that is not finite.

    Parameters come first, then the images, the outputs of layers in the order in which a clean pass computes them,
    running statistics, and gradients in the order in which they were computed, from the last layer to the first.

    Returns:
        How early it is, 0 first, and where, in words.
    """
    layer = first_nonfinite_layer(network, images)
    gradients = [(name, p.grad) for name, p in network.named_parameters() if p.grad is not None]
    places: list[tuple[str, Iterable[tuple[str, Tensor]]]] = [
        ("the parameter {}", network.named_parameters()),
        ("the images{}", [("", images)]),
        ("the output of layer {}", [] if layer is None else [(layer, torch.tensor(torch.nan))]),
        ("{}", statistics.items()),
        ("the gradient of {}", reversed(gradients)),
    ]
    for place, (words, named) in enumerate(places):
        name = next((name for name, tensor in named if not tensor.isfinite().all()), None)
        if name is not None:
            return place, words.format(name)
    return len(places), "the loss alone"


def training_state(
    network: nn.Module, statistics: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, ema: ModelEmaV3 | None
) -> Iterator[tuple[str, Tensor]]:
    """Give (name, values) of all that training carries from step to step."""
    yield from network.named_parameters()
    yield from statistics.items()
    if ema is not None:
        average = ema.module.state_dict()
        yield from ((f"the average of {name}", average[name]) for name, _ in network.named_parameters())
    names: dict[Tensor, str] = {p: name for name, p in network.named_parameters()}
    for p, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                yield f"the optimizer's {key} of {names.get(p)}", value


@torch.no_grad()
def first_nonfinite_layer(network: nn.Module, images: Tensor) -> str | None:
    """Name of the layer that is the first, in a forward over `images`, to put out a value that is not finite."""
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, (tuple, list)) else (output,)
        if any(isinstance(t, Tensor) and not t.isfinite().all() for t in tensors):
            found.append(name)

    hooks = [
        module.register_forward_hook(partial(look, name or type(module).__name__))
        for name, module in network.named_modules()
    ]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
