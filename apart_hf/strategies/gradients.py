"""Gradients around the clean pass: those before it, those of others, and processes that average them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def isolated_gradients(model: nn.Module) -> Iterator[None]:
    """Let p.grad start from nothing within the block; at its end, what was there before is added again.

    It is done in place, so that gradients that are views (DDP's buckets) stay views.
    """
    present = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    earlier = [(p, gradient.clone()) for p, gradient in present]
    for _, gradient in present:
        gradient.zero_()
    try:
        yield
    finally:
        for p, before in earlier:
            if p.grad is None:
                p.grad = before
            else:
                p.grad.add_(before)


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
def scaled_gradients(parameters: Iterable[Tensor], factor: float) -> Iterator[None]:
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


def silent_for_others(backward: Callable[[Tensor], Any], own: Container[Tensor]) -> Callable[[Tensor], Any]:
    """Let a backward add nothing to leaves that are not `own`, such as a criterion's parameters.

    They get zeros, in which values that are not finite stay visible.
    """

    def silent(loss: Tensor) -> None:
        others = [leaf for leaf in look_through(loss)[0] if leaf not in own]
        handles = [leaf.register_hook(lambda gradient: gradient * 0.0) for leaf in others]
        try:
            backward(loss)
        finally:
            for handle in handles:
                handle.remove()

    return silent
