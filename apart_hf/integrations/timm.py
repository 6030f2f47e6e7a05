"""timm's own training script: its task makes both passes when it computes its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn

from apart_hf.errors import ApartError
from apart_hf.strategies.checks import check_criterion
from apart_hf.strategies.hyper_parameters import MethodName, Uneven
from apart_hf.strategies.loss import create_loss
from apart_hf.strategies.methods import METHODS
from apart_hf.strategies.two_pass_loss import TwoPassLoss, check_options

Task = TypeVar("Task", bound=nn.Module)
KEY = "apart_hf"  # of our part in the task's state
_ELSEWHERE = {
    "accelerator": "timm's script has its own scaler, which calls backward",
    "autocast": "both passes take the autocast that the script puts around the task",
    "backward": "the script calls it on the loss of the task's result",
    "criterion": "the task has it: ClassificationTask(model, criterion)",
    "loss_fn": "the task computes the loss",
    "model": "the task has it: ClassificationTask(model, criterion)",
    "samples": "the task's tensors tell how many there are",
}


def apart(
    task: Task,
    name: MethodName,
    *,
    generator: torch.Generator | None = None,
    every: int = 1,
    uneven: Uneven = "fit",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    **hyper: Any,
) -> Task:
    """Let a task of `timm.task` train by a method: `task = apart(task, "apart", epsilon=0.1, groups=16)`.

    The task's forward then makes both passes in training, and `result["loss"].backward()` adds the method's gradient:
    the rest of the script stays as it is. In eval mode and under torch.no_grad nothing changes. Call it before the
    script resumes, compiles and wraps the task; checkpoints of timm's saver keep the method's state.

    Args:
        task: a `ClassificationTask`, or another one of timm's, whose trainable module is trained.
        name: one of `list_strategies()`.
        generator: see `create_loss`; its state is in the checkpoints.
        every: the second pass is made for each so-manieth batch.
        uneven: see `create_strategy`; the default fits groups and ratio to batches of any size.
        mean, std: see `create_strategy`; the script's data_config has them where they are not the model's.
        **hyper: the method's hyper-parameters, see `create_strategy`.

    Returns:
        The same task. `task.forward.loss` is its `TwoPassLoss`.

    Raises:
        ApartError: as `create_strategy` does, for what is no task, and for one that has its forward replaced already.

    Example:
        >>> import timm, torch
        >>> from timm.task import ClassificationTask
        >>> from apart_hf.integrations.timm import apart
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> task = apart(ClassificationTask(model, verbose=False), "apart", epsilon=0.1, groups=4)
        >>> result = task(torch.randn(8, 3, 32, 32), torch.arange(8))
        >>> result["loss"].backward()
        >>> task.forward.loss.strategy
        apart(epsilon=0.1, groups=4, ratio=1.0)
    """
    if not all(hasattr(task, method) for method in ("get_trainable_module", "get_task_state", "load_task_state")):
        raise ApartError(
            f"apart takes a task of timm.task, and was given an object of type {type(task).__name__}; wrap the model: "
            "ClassificationTask(model, criterion)."
        )
    if "forward" in task.__dict__:
        raise ApartError("the task has its forward replaced already; call apart once.")
    check_options(name, hyper, _ELSEWHERE)
    if METHODS[name].perturbations:
        for part in (*vars(task).values(), *task.children()):
            check_criterion(part)
    options: dict[str, Any] = {"generator": generator, "every": every, "uneven": uneven, **hyper}
    options |= {"mean": mean, "std": std}
    forward = TaskForward(task, name, options)
    kept, load = cast(Any, task).get_task_state, cast(Any, task).load_task_state

    def get_task_state(module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        state = kept(module, ema)
        return state if ema else {**state, KEY: forward.loss.state_dict()}

    def load_task_state(
        state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        rest = dict(state or {})
        own = rest.pop(KEY, None)
        load(rest if state else state, strict, module, ema)
        if own is not None and not ema:
            forward.loss.load_state_dict(own)

    task.__dict__.update(forward=forward, get_task_state=get_task_state, load_task_state=load_task_state)
    return task


class TaskForward:
    """Takes the place of a task's forward.

    Args:
        task: of timm.
        name: of the method.
        options: further arguments of `create_loss`.

    Attributes:
        loss: of the module that is trained, which changes where the task is compiled or wrapped.
    """

    def __init__(self, task: Any, name: MethodName, options: dict[str, Any]):
        self.task, self.name, self.options = task, name, options
        self._forward: Callable[..., dict[str, Any]] = task.forward
        self.loss = self._loss()

    def _loss(self) -> TwoPassLoss[Any, Any]:
        return create_loss(self.name, self.task.get_trainable_module(), self._compute, **self.options)

    def _compute(self, network: nn.Module, batch: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
        with self._trained_in_place_of(network):
            result = self._forward(*batch[0], **batch[1])
        return result["loss"], result

    @contextmanager
    def _trained_in_place_of(self, network: nn.Module) -> Iterator[None]:
        """Let the task call the network itself: within DistributedDataParallel's forward that is what runs."""
        module, children = self.task.get_trainable_module(), self.task._modules
        places = [key for key, child in children.items() if child is module and child is not network]
        try:
            children.update(dict.fromkeys(places, network))
            yield
        finally:
            children.update(dict.fromkeys(places, module))

    def __call__(self, *inputs: Any, **named: Any) -> dict[str, Any]:
        """Compute what the task returns: its loss, whose backward adds the method's gradient, and outputs, detached."""
        if self.loss.model is not self.task.get_trainable_module():
            before, self.loss = self.loss, self._loss()
            self.loss.go_on_from(before)
        loss, result = self.loss((inputs, named))
        result["loss"] = loss
        return result
