"""What a training step of several methods costs, side by side: time, page faults, memory, operations."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import timm
import torch
from torch import Tensor, nn

from apart_hf.batchnorm import use_kernels
from apart_hf.batchnorm.kernels import KernelSet
from apart_hf.errors import ApartError, first_line, unknown_name
from apart_hf.paper.method_settings import parse_method
from apart_hf.strategies.create import create_strategy
from apart_hf.strategies.hyper_parameters import MethodName
from apart_hf.strategies.methods import METHODS
from apart_hf.training.cuda_graph import CudaRecorder, Recorder, recorded
from apart_hf.training.on_device import UpdateOnDevice
from apart_hf.utils.operation_counts import OperationCounts

WARM_UP = 2  # rounds that do not count
AmpDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class StepCase:
    """Says on which network, with which batches and in which arithmetic steps are made.

    Args:
        model: a name of timm's.
        batch_size: images of a step.
        img_size: edge in pixels; None: the model's.
        groups: of the methods that have groups.
        num_classes: of the network.
        channels_last: the memory format of images and weights; False: NCHW.
        amp_dtype: arithmetic of the forwards.
        torchcompile: compile the model.
        cuda_graph: record a step, and replay it.
        device: as torch names it.
        kernels: the set of batch-norm kernels; "auto" is that of the device.
    """

    model: str
    batch_size: int = 128
    img_size: int | None = None
    groups: int = 16
    num_classes: int = 100
    channels_last: bool = False
    amp_dtype: AmpDtype = "float32"
    torchcompile: bool = False
    cuda_graph: bool = False
    device: str = "cpu"
    kernels: KernelSet = "auto"


class Contender:
    """One method on a model of its own, which takes steps on one batch of random images.

    Args:
        case: of the steps.
        method: its name, or its name with hyper-parameters (see `method_settings`).

    Attributes:
        seconds, faults: of each timed step, and its minor page faults.

    Raises:
        ApartError: where the method does not fit the model or the batch, or there is no such model or device.
    """

    def __init__(self, case: StepCase, method: str):
        torch.manual_seed(0)
        self.case, self.method = case, method
        self._name, self._hyper = parse_method(method)
        if not timm.is_model(case.model):
            raise unknown_name("model", case.model, timm.list_models())
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        model = timm.create_model(case.model, num_classes=case.num_classes)
        try:
            self.device = torch.device(case.device)
            self.model = model.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        except (AssertionError, RuntimeError) as error:
            raise ApartError(f"--device {case.device}: cannot be used ({first_line(error)}); cpu can.") from error
        size = case.img_size or self.model.pretrained_cfg["input_size"][-1]
        shape = case.batch_size, 3, size, size
        self.images = torch.randn(shape, device=self.device).contiguous(memory_format=layout)
        self.targets = torch.randint(case.num_classes, (case.batch_size,), device=self.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.criterion = nn.CrossEntropyLoss()
        self.strategy = self._strategy(torch.compile(self.model) if case.torchcompile else self.model)
        self.strategy.second_pass_size(case.batch_size)  # raises where the batch does not fit
        self.seconds: list[float] = []
        self.faults: list[int] = []
        self._replay: Callable[[], Any] | None = None
        if case.cuda_graph:
            self._check_graph()
            self._replay = self._recorded(CudaRecorder(self.device))

    def _strategy(self, model: Any) -> Any:
        dtype = getattr(torch, self.case.amp_dtype)
        device = self.device.type
        autocast = None if dtype is torch.float32 else (lambda: torch.autocast(device, dtype))
        hyper = dict(self._hyper)
        if "groups" in METHODS[self._name].hyper_parameters():
            hyper.setdefault("groups", self.case.groups)
        return create_strategy(cast(MethodName, self._name), model, autocast=autocast, **hyper)

    def gradients(self) -> None:
        """Fill p.grad once, without the optimizer."""
        with use_kernels(self.case.kernels):
            self.strategy.accumulate_gradients(self.images, self.targets, self.criterion)

    def step(self) -> None:
        """Make a whole step."""
        if self._replay is not None:
            self._replay()
            return
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _check_graph(self) -> None:
        if self.device.type != "cuda" or self.case.torchcompile:
            found = "--torchcompile" if self.case.torchcompile else f"--device {self.case.device}"
            raise ApartError(f"--cuda-graph needs a GPU and a model that is not compiled, not {found}; leave one out.")

    def _recorded(self, recorder: Recorder) -> Callable[[], Any]:
        """Record a step, after some that warm up."""
        update = UpdateOnDevice(self.optimizer)
        update.refresh()

        def step() -> tuple[Tensor, ...]:
            self.gradients()
            with update.within():
                self.optimizer.step()
            self.optimizer.zero_grad()
            return ()

        return recorded(recorder, step)

    def timed_step(self) -> None:
        """Make a step and note its time and page faults."""
        self.synchronise()
        faults, start = _faults(), time.perf_counter()
        self.step()
        self.synchronise()
        self.seconds.append(time.perf_counter() - start)
        self.faults.append(_faults() - faults)

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory(self) -> float:
        """Measure MiB allocated at the peak of a step; on the CPU by the profiler's record of allocations."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step()
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.step()
        held = peak = 0
        recorded = cast(Any, profile.profiler).kineto_results.events()
        for event in sorted(recorded, key=lambda one: one.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak / 2**20

    def counts(self) -> dict[str, int]:
        """Count the operations of one `gradients`, and the copies of activations among them.

        It adds to gradients that are there already: whether the first ones are made or added would count otherwise.
        """
        self.gradients()
        with OperationCounts(self.model) as found:
            self.gradients()
        self.optimizer.zero_grad()
        return {"operations": found.operations.total(), "copies": found.copies.total()}


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def make_contenders(case: StepCase, methods: Sequence[str]) -> list[Contender]:
    """Make one contender for each method.

    Raises:
        ApartError: as `Contender`, and where a method is named twice.
    """
    twice = [method for method in methods if methods.count(method) > 1]
    if twice:
        raise ApartError(f"--methods {','.join(methods)}: {twice[0]} is named twice; name each method once.")
    return [Contender(case, method) for method in methods]


def measure(contenders: Sequence[Contender], repeats: int, *, count: bool = False) -> list[dict[str, Any]]:
    """Let contenders take steps in turn, so that a machine that slows down slows all of them.

    Args:
        contenders: the first is what the others are compared with.
        repeats: rounds, after `WARM_UP` that do not count.
        count: count operations and copies too, of the model as it is without torch.compile.

    Returns:
        A row for each: ms_per_step (median), spread (its interquartile range, in per cent of it), images_per_second,
        ratio_min, ratio_median and ratio_max (within each round, to the first), faults (median of the minor page
        faults of a step), peak_memory_mib and, if counted, operations and copies.
    """
    for repeat in range(repeats + WARM_UP):
        for contender in contenders:
            contender.timed_step()
            if repeat < WARM_UP:
                contender.seconds.clear()
                contender.faults.clear()
    first = contenders[0]
    return [_row(contender, first) | (contender.counts() if count else {}) for contender in contenders]


def _row(contender: Contender, first: Contender) -> dict[str, Any]:
    ratios = [one / other for one, other in zip(contender.seconds, first.seconds, strict=True)]
    median = statistics.median(contender.seconds)
    return {
        "method": contender.method,
        "ms_per_step": 1000 * median,
        "spread": 100 * _interquartile_range(contender.seconds) / median,
        "images_per_second": contender.case.batch_size / median,
        "ratio_min": min(ratios),
        "ratio_median": statistics.median(ratios),
        "ratio_max": max(ratios),
        "faults": statistics.median(contender.faults),
        "peak_memory_mib": contender.peak_memory(),
    }


def _interquartile_range(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low
