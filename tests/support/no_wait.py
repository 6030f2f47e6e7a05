"""A mode in which the host may not wait for a device, on the CPU: what would wait there is refused here."""

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OPERATIONS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "unique")
METHODS = (Tensor.tolist, Tensor.numpy, Tensor.cpu)  # of which the CPU dispatches nothing


class _Methods(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in METHODS, function.__name__
        return function(*args, **(kwargs or {}))


class NoWait(TorchDispatchMode):
    """Refuses operations whose outcome the host would wait for."""

    def __enter__(self):
        self._methods = _Methods()
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        assert not name.startswith(OPERATIONS), name
        return operation(*args, **(kwargs or {}))
