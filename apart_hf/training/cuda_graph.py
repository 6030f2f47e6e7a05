"""A function of tensors whose kernels are recorded once, as a CUDA graph, and launched together from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

WARM_UP = 3  # calls before one is recorded, in which libraries choose their kernels and memory is found
Outcome = TypeVar("Outcome", bound=tuple[Tensor | None, ...])


class Recorder(Protocol):
    """What records functions, whose tensors stay where they are from call to call."""

    def run(self, call: Callable[[], Outcome]) -> Outcome:
        """Call a function that is not recorded, or that is to be recorded later."""

    def record(self, call: Callable[[], Outcome]) -> Callable[[], Outcome]:
        """Record what a function does, without doing it, and return what does it.

        Its outcome is in the same tensors each time.

        Raises:
            RuntimeError: where the function asks for a number, or does something else that cannot be recorded.
        """


def recorded(recorder: Recorder, call: Callable[[], Outcome]) -> Callable[[], Outcome]:
    """Record a function after the calls that it takes to warm up."""
    for _ in range(WARM_UP):
        recorder.run(call)
    return recorder.record(call)


class CudaRecorder:
    """Records CUDA graphs, which share their memory: the outcome of one is lost where another is replayed.

    Args:
        device: a GPU.
        generators: of random numbers on it that functions draw from, beside torch's own.
    """

    def __init__(self, device: torch.device, generators: Iterable[torch.Generator] = ()):
        self.device, self.generators = device, list(generators)
        # what is recorded may not be tied to the default stream, and gradients are to the stream that made them
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def run(self, call: Callable[[], Outcome]) -> Outcome:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outcome = call()
        current.wait_stream(self._stream)
        for tensor in outcome:
            if tensor is not None:
                tensor.record_stream(current)
        return outcome

    def record(self, call: Callable[[], Outcome]) -> Callable[[], Outcome]:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        # threads that pin batches may go on with what they do
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outcome = call()

        def replay() -> Outcome:
            graph.replay()
            return outcome

        return replay
