"""How many operations torch dispatches in a block, which of them copy activations, and what they read and write."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = ("clone", "copy", "copy_", "_to_copy", "contiguous")  # operations that compute nothing
_VIEWS = ("_unsafe_view", "_reshape_alias")  # which their schemas do not call views
_OVERWRITE = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")  # what they write to is not read
_ALLOCATE = ("empty", "new_empty")  # and compute nothing


class OperationCounts(TorchDispatchMode):
    """Counts the operations of forwards and backwards within its block, on any device; views are no operations.

    Bytes are those of an operation's tensors, each once: what must be read and written where nothing stays in a cache
    between two operations. A kernel that passes over its input twice, as batch norm's may, reads more.

    A copy is of an activation where its result has as many elements as the input or output of one of the model's
    modules, and neither it nor its source is a parameter, a gradient or a buffer. What a compiled model runs inside of
    its graphs is not seen.

    Args:
        model: whose inputs and outputs are its activations.

    Attributes:
        operations: how often each was dispatched, by name, such as "convolution_backward".
        copies: the same of copies of activations alone; complete when the block ends.
        read, written: bytes, by name.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
        >>> images = torch.ones(2, 3, 8, 8)
        >>> with OperationCounts(model) as counts:
        ...     found = model(images).clone().flatten()
        >>> dict(counts.operations), dict(counts.copies)
        ({'convolution': 1, 'relu': 1, 'clone': 1}, {'clone': 1})
        >>> counts.read["relu"], counts.written["relu"]  # 2 x 4 x 6 x 6 values
        (1152, 1152)
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.operations: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self._sizes: set[int] = set()  # elements of each activation
        self._copied: list[tuple[str, int]] = []  # until all sizes are known

    def __enter__(self) -> OperationCounts:
        self._hooks = [module.register_forward_hook(self._see) for module in self.model.modules()]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        self.copies.update(name for name, size in self._copied if size in self._sizes)
        self._copied.clear()

    def _see(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._sizes.update(tensor.numel() for tensor in _tensors((inputs, output)))

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if operation.is_view or name in _VIEWS:
            return result
        self.operations[name] += 1
        self._count_bytes(operation, name, args, kwargs or {}, result)
        if name in COPIES and not self._is_state((args, result)):
            self._copied.append((name, result.numel()))
        return result

    def _count_bytes(self, operation: Any, name: str, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if name.startswith(_ALLOCATE):
            return
        schema = operation._schema
        for argument, value in [*zip(schema.arguments, args), *((a, kwargs.get(a.name)) for a in schema.arguments)]:
            size = _bytes(value)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            self.written[name] += size * is_written
            self.read[name] += size * (not (is_written and (argument.is_out or name in _OVERWRITE)))
        if all(returned.alias_info is None for returned in schema.returns):  # what was made, and no argument
            self.written[name] += _bytes(result)

    def _is_state(self, tree: Any) -> bool:
        """Tell whether any of these tensors is of the model's own state, or a view of it."""
        held = {tensor.untyped_storage()._cdata for tensor in self._state()}
        return any(tensor.untyped_storage()._cdata in held for tensor in _tensors(tree))

    def _state(self) -> Iterator[Tensor]:
        for parameter in self.model.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        yield from self.model.buffers()


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _bytes(tree: Any) -> int:
    """Count the bytes of tensors; a value that is repeated by a stride of 0 is one."""
    return sum(
        tensor.element_size() * math.prod(size for size, step in zip(tensor.shape, tensor.stride()) if step)
        for tensor in _tensors(tree)
    )


def count_operations(model: nn.Module, call: Callable[[], object]) -> OperationCounts:
    """Count the operations of one call, see `OperationCounts`."""
    with OperationCounts(model) as counts:
        call()
    return counts
