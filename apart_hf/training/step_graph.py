"""Steps that are recorded once and replayed: passes, ascent, clipping, update and average as one CUDA graph."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from apart_hf.errors import first_line
from apart_hf.training.cuda_graph import WARM_UP, CudaRecorder, Recorder
from apart_hf.training.graph_obstacles import obstacles
from apart_hf.training.on_device import AverageOnDevice, UpdateOnDevice, unwrapped
from apart_hf.training.step import Step
from apart_hf.training.step_figures import gradient_norm

if TYPE_CHECKING:
    from apart_hf.training.trainer import Trainer

_log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """Holds what a step shows: losses of both passes, output of the clean one, norm of the gradient before clipping."""

    loss: Tensor
    output: Tensor
    perturbed_loss: Tensor | None
    norm: Tensor | None


class StepGraphs:
    """Makes the optimizer steps of a training, those of its usual batches as graphs: one of plain steps, one of others.

    Numbers that change are tensors: learning rates, the average's share, the step's own. A batch of another size, and
    steps while a schedule moves hyper-parameters, are made one operation after another. Verdicts stay on the device
    and are read every `log_interval` steps, after the step.

    Args:
        trainer: whose steps they are, with none of the `obstacles`.
        step: of the trainer; what is recorded are its parts.
        recorder: of graphs.
    """

    def __init__(self, trainer: Trainer, step: Step, recorder: Recorder):
        self.trainer, self._step, self._recorder = trainer, step, recorder
        self._update = UpdateOnDevice(unwrapped(trainer.optimizer))
        self._average = None if trainer.ema is None else AverageOnDevice(trainer.ema, step.network)
        self._number = torch.zeros((), dtype=torch.int64, device=trainer.accelerator.device)
        self._gave_up = False
        self.forget()

    def forget(self) -> None:
        """Record anew: tensors that graphs have read or written may be others now."""
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._hyper: dict[str, Any] = {}
        self._graphs: dict[bool, Callable[[], Outcome]] = {}
        self._seen: Counter[bool] = Counter()

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Make a step.

        Args:
            images, targets: see `Trainer.train_step`.

        Returns:
            Loss and output of the clean pass, which the next step may write over.

        Raises:
            NonFinite: where the verdict is read, and a step was not finite.
        """
        trainer, strategy, number = self.trainer, self.trainer.strategy, self.trainer.progress.steps + 1
        self._number.fill_(number)
        self._update.refresh()
        if self._average is not None:
            self._average.refresh(number)
        made = strategy.steps
        outcome = self._made(images, targets, made)
        # a replay runs no Python
        strategy.steps, strategy.perturbed_loss = made + 1, outcome.perturbed_loss
        if trainer.figures is not None:
            trainer.figures.end_batch(number, True, outcome.norm)
        trainer.progress.steps = number
        trainer.guard.look_when_due(number)
        return outcome.loss, outcome.output

    def _made(self, images: Tensor, targets: Tensor, made: int) -> Outcome:
        strategy = self.trainer.strategy
        if self._hyper != strategy.hyper:
            self.forget()
            self._hyper = dict(strategy.hyper)
        if not self._takes(images, targets):
            return self._recorder.run(partial(self._parts, images, targets, made))
        call = partial(self._parts, *self._copied(images, targets), made)
        kind = self._step.may_perturb and not (made + 1) % strategy.every
        self._seen[kind] += 1
        if kind not in self._graphs and not self._gave_up and self._seen[kind] > WARM_UP:
            try:
                self._graphs[kind] = self._recorder.record(call)
            except RuntimeError as error:
                self._gave_up = True
                _log.warning(f"warning: --cuda-graph is left out: a step cannot be recorded ({first_line(error)}).")
        return self._graphs[kind]() if kind in self._graphs else self._recorder.run(call)

    def _takes(self, images: Tensor, targets: Tensor) -> bool:
        """Tell whether a batch is of the usual kind, which is that of the largest so far."""
        if self._inputs is None or len(self._inputs[0]) < len(images):
            self._graphs.clear()
            self._seen.clear()
            self._inputs = torch.empty_like(images), torch.empty_like(targets)
        return all(
            (place.shape, place.dtype) == (given.shape, given.dtype)
            for place, given in zip(self._inputs, (images, targets))
        )

    def _copied(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Copy a batch to where graphs read it."""
        assert self._inputs is not None
        for place, given in zip(self._inputs, (images, targets)):
            place.copy_(given)
        return self._inputs

    def _parts(self, images: Tensor, targets: Tensor, made: int) -> Outcome:
        """Make what is recorded: all of a step, at whose end there are no gradients, so that a graph makes its own."""
        trainer, strategy = self.trainer, self.trainer.strategy
        strategy.steps = made
        loss, output = self._step.gradient(images, targets)
        trainer.guard.note(self._number, loss)
        norm = None if trainer.figures is None else gradient_norm(trainer)
        with self._update.within():
            self._step.update()
        trainer.optimizer.zero_grad()
        if self._average is not None:
            self._average.update()
        return Outcome(loss, output, strategy.perturbed_loss, norm)


def step_graphs(trainer: Trainer, step: Step) -> StepGraphs | None:
    """Make the graphs of a trainer's steps; None: there are obstacles, which one line has named."""
    found = list(obstacles(trainer))
    if found:
        _log.warning(f"warning: --cuda-graph is left out: {'; '.join(found)}.")
        return None
    generator = trainer.strategy.generator
    generators = [] if generator is None else [generator]
    return StepGraphs(trainer, step, CudaRecorder(trainer.accelerator.device, generators))
