"""The backwards within a loss: gradients are collected by hand, and p.grad of the model is as it was afterwards.

torch.autograd.grad is what collects them, rather than `backward`: it fires neither the hooks by which DDP reduces
gradients nor those that step an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apart_hf.strategies.gradients import look_through

START, LARGEST, GROWS_AFTER = 2.0**12, 2.0**24, 2000  # of the scale; passes


class InnerBackward:
    """Takes the place of `loss.backward()` in both passes of a strategy.

    Where activations are float16, losses are scaled before and gradients unscaled after each backward, or small ones
    would vanish: a gradient scaler acts outside of these passes. After an overflow, which the scaler sees in what is
    handed on, the scale is halved.

    Args:
        model: whose gradients are collected.

    Attributes:
        is_half: whether activations are float16, where the graph does not tell.
        scale: for float16; None: it was not needed yet.
        passes: with this scale, all of them finite.
    """

    def __init__(self, model: nn.Module):
        self.model, self.is_half = model, False
        self.scale: Tensor | None = None
        self.passes = torch.zeros(())
        self._own: list[nn.Parameter] = []
        self._before: dict[Tensor, Tensor | None] = {}
        self._latest: list[Tensor] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Put p.grad aside within the block, in which it holds the gradient of the passes alone."""
        self._own, self._latest = list(self.model.parameters()), []
        try:
            for p in self._own:
                self._before[p], p.grad = p.grad, None
            yield
        finally:
            for leaf, gradient in self._before.items():
                leaf.grad = gradient
            self._before, self._own, self._latest = {}, [], []

    def __call__(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to that of every leaf of its graph: the model's, a perturbation's, the user's."""
        leaves, is_half = look_through(loss)
        if is_half or self.is_half:
            gradients = self._scaled(loss, leaves)
        else:
            gradients = list(torch.autograd.grad(loss, leaves, allow_unused=True))
        for leaf in reversed(leaves):
            gradient = gradients.pop()  # so that it is freed once it was added
            if leaf not in self._before:
                self._before[leaf], leaf.grad = leaf.grad, None
            if gradient is not None:
                leaf.grad = _own_copy(leaf, gradient) if leaf.grad is None else leaf.grad + gradient
        self._latest = leaves

    def collected(self) -> list[tuple[Tensor, Tensor]]:
        """List (leaf, gradient): parameters of the model, and what else the latest pass has in its graph.

        What a perturbation collects for itself is in the graph of the clean pass alone.
        """
        own = set(self._own)
        others = [leaf for leaf in self._latest if leaf not in own]
        return [(leaf, leaf.grad) for leaf in (*self._own, *others) if leaf.grad is not None]

    def state_dict(self) -> dict[str, Any]:
        """Return the scale, and how many passes it has lasted; nothing, where it was not needed."""
        return {} if self.scale is None else {"scale": [float(self.scale), float(self.passes)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned, or any other."""
        if "scale" in state:
            self.scale, self.passes = (torch.tensor(value) for value in state["scale"])

    def _scaled(self, loss: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
        if self.scale is None or self.scale.device != loss.device:
            scale = torch.tensor(START) if self.scale is None else self.scale
            self.scale, self.passes = scale.to(loss.device), self.passes.to(loss.device)
        gradients = torch.autograd.grad(loss * self.scale, leaves, allow_unused=True)
        found: list[Tensor | None] = [None if g is None else g / self.scale.to(g.device) for g in gradients]
        finite = torch.stack([g.isfinite().all().to(loss.device) for g in gradients if g is not None]).all()
        self.passes = torch.where(finite, self.passes + 1, 0.0)
        grown = torch.where(self.passes >= GROWS_AFTER, 2 * self.scale, self.scale)
        self.passes = torch.where(self.passes >= GROWS_AFTER, 0.0, self.passes)
        self.scale = torch.where(finite, grown, self.scale / 2).clamp(1.0, LARGEST)
        return found


def _own_copy(leaf: Tensor, gradient: Tensor) -> Tensor:
    """Copy a gradient, which may be another leaf's, too, in the leaf's memory format, as `backward` does.

    Norms depend on the format in the last bit.
    """
    return torch.empty_like(leaf).copy_(gradient) if gradient.layout == torch.strided else gradient.clone()
