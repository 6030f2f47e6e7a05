"""What surrounds the clean pass: gradients that were there before, processes that average them, and what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

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


def unsynchronised(model: nn.Module) -> AbstractContextManager[Any]:
    """Keep DDP from reducing gradients in the first backward: the second reduces the sum of both, once."""
    no_sync = getattr(model, "no_sync", None)
    return no_sync() if no_sync is not None else nullcontext()


def detached(output: Any) -> Any:
    """Detach every tensor of a model's output, in tuples, lists and mappings as well."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, (tuple, list)):
        items = [detached(item) for item in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if isinstance(output, Mapping):
        return {key: detached(value) for key, value in output.items()}
    return output
