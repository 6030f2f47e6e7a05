"""A recorder for the CPU: it replays operations on the tensors that they had, as a CUDA graph does, and no Python."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.no_wait import NoWait


class RecordedOperations:
    """Records what a function dispatches; numbers of Python are then what they were.

    Args:
        generators: from which functions draw, beside torch's own.
        constants: tensors may be made of numbers of the host, which a GPU would wait for.

    `recorded` and `replayed` count.
    """

    def __init__(self, generators=(), constants=False):
        self.generators = [torch.default_generator, *generators]
        self.constants, self.recorded, self.replayed = constants, 0, 0

    def run(self, call):
        return call()

    def record(self, call):
        """Recording does nothing: what the function wrote over is put back."""
        tape, drawn = _Tape(self.constants), [generator.get_state() for generator in self.generators]
        try:
            with NoWait(), tape:
                outcome = call()
        except AssertionError as error:
            raise RuntimeError(f"not while it is recorded: {error}") from error
        finally:
            tape.undo()
            for generator, state in zip(self.generators, drawn):
                generator.set_state(state)
        self.recorded += 1

        def replay():
            self.replayed += 1
            tape.replay()
            return outcome

        return replay


class _Tape(TorchDispatchMode):
    def __init__(self, constants):
        super().__init__()
        self.constants = constants
        self.operations, self.before, self.own = [], {}, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        assert self.constants or not name.startswith("lift"), "a tensor is made of numbers of the host"
        for tensor in _tensors((args, kwargs)):
            key = tensor.untyped_storage()._cdata
            if key not in self.own and key not in self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[key] = whole, whole.clone()
        result = operation(*args, **kwargs)
        self.own.update(key for t in _tensors(result) if (key := t.untyped_storage()._cdata) not in self.before)
        if not operation.is_view and not name.startswith(("empty", "new_empty")):
            self.operations.append((operation, args, kwargs, result))
        return result

    def undo(self):
        for whole, values in self.before.values():
            whole.copy_(values)

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, outcome in self.operations:
            for place, value in zip(_tensors(outcome), _tensors(operation(*args, **kwargs)), strict=True):
                if place.data_ptr() != value.data_ptr():
                    place.data.copy_(value)


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
