"""Gradients around the clean pass: those before it, those of others, and processes that average them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from apart_hf.strategies.flat import flat_copy


@contextmanager
def isolated_gradients(model: nn.Module) -> Iterator[None]:
    """Let p.grad start from nothing within the block; at its end, what was there before is added again.

    It is done in place, so that gradients that are views (DDP's buckets) stay views.
    """
    present = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    gradients = [gradient for _, gradient in present]
    earlier = flat_copy(gradients, gradients)[1] if gradients else []
    if gradients:
        torch._foreach_zero_(gradients)
    try:
        yield
    finally:
        for p, gradient in present:
            p.grad = gradient.zero_() if p.grad is None else p.grad
        if earlier:
            with torch.no_grad():
                torch._foreach_add_([p.grad for p, _ in present if p.grad is not None], earlier)


@contextmanager
def gradients_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let p.grad start from nothing within the block; at its end it is what it was before, views included."""
    before = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in parameters]
    for _, gradient, _ in before:
        if gradient is not None:
            gradient.zero_()
    try:
        yield
    finally:
        for p, gradient, value in before:
            if gradient is not None and value is not None:
                gradient.copy_(value)
            p.grad = gradient


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let parameters get no gradient within the block: none is computed, and DDP awaits none."""
    trained = [p for p in parameters if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


@contextmanager
def scaled_gradients(parameters: Iterable[Tensor], factor: float | Tensor) -> Iterator[None]:
    """Multiply what a backward within the block adds to the gradients of parameters."""
    handles = [p.register_hook(lambda gradient: gradient * factor) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def unsynchronised(model: nn.Module) -> AbstractContextManager[Any]:
    """Keep DDP from reducing gradients in the first backward: the second reduces the sum of both, once."""
    no_sync = getattr(model, "no_sync", None)
    return no_sync() if no_sync is not None else nullcontext()


def look_through(loss: Tensor) -> tuple[list[Tensor], bool]:
    """Find the leaves of a loss's graph, and whether any value in it is float16."""
    leaves: list[Tensor] = []
    is_half, seen, left = False, set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None) if type(node).__name__ == "AccumulateGrad" else None
        leaves += [] if leaf is None else [leaf]
        is_half = is_half or any(value.dtype == torch.float16 for value in getattr(node, "_input_metadata", ()))
        left.extend(before for before, _ in node.next_functions)
    return leaves, is_half


def silent_for_others(
    backward: Callable[[Tensor], Any], own: Callable[[], Container[Tensor]]
) -> Callable[[Tensor], Any]:
    """Let a backward add nothing to leaves that are not `own`, such as a criterion's parameters.

    They get zeros, in which values that are not finite stay visible. What is own is asked after the forward, in which a
    perturbation may make its tensors.
    """

    def silent(loss: Tensor) -> None:
        known = own()
        others = [leaf for leaf in look_through(loss)[0] if leaf not in known]
        handles = [leaf.register_hook(lambda gradient: gradient * 0.0) for leaf in others]
        try:
            backward(loss)
        finally:
            for handle in handles:
                handle.remove()

    return silent


class _Finished(torch.autograd.Function):
    """A loss whose gradients are known: its backward gives them, times what comes from above."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *tensors: Tensor) -> Tensor:
        """Take the loss, and as many leaves as gradients: (loss, count, *leaves, *gradients)."""
        ctx.save_for_backward(*tensors[count:])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [gradient * scale.to(gradient.device) for gradient in ctx.saved_tensors]
        return None, None, *gradients, *[None] * len(gradients)


def handed_on(loss: Tensor, gradients: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return a loss whose backward adds the given gradients to their leaves, times what comes from above.

    Args:
        loss: a scalar, the value.
        gradients: (leaf, gradient) pairs.
    """
    leaves, values = zip(*gradients)
    return _Finished.apply(loss, len(leaves), *leaves, *values)
