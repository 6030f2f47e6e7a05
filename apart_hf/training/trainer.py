"""The Accelerate training loop. It knows of strategies how they step, are set and are kept, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from apart_hf.training.clipping import ClipMode
from apart_hf.training.distributed_statistics import average_statistics, running_statistics, with_first_buffers
from apart_hf.training.epoch_metrics import EpochMetrics, Evaluation, TrainedEpoch
from apart_hf.training.evaluation import evaluate
from apart_hf.training.loader_reports import count_skipped, say_warning
from apart_hf.training.nonfinite import Guard
from apart_hf.training.predictions import SHOWN
from apart_hf.training.progress import EpochReport, Progress, learning_rate
from apart_hf.training.random_state import random_state, set_random_state
from apart_hf.training.state import ProcessState, TrainerState
from apart_hf.training.step import Step
from apart_hf.training.step_figures import StepFigures
from apart_hf.training.step_graph import StepGraphs, step_graphs


@dataclass
class Trainer:
    """Trains and evaluates a model, one epoch at a time.

    Args:
        accelerator: has prepared model, optimizer and loaders.
        model: in any wrapper.
        strategy: its `accumulate_gradients` fills p.grad; it was given the accelerator, which tells it where steps end.
        optimizer: stepped once in as many batches as the accelerator accumulates.
        scheduler: timm's, by update or by epoch; None: a constant learning rate.
        criterion: criterion(output, targets) -> mean loss; takes soft targets where `mixup` makes them.
        train_loader, val_loader: batches of (images, class indices).
        mixup: timm's Mixup, drawn once a batch and so the same in both passes; None: off. It may have `set_epoch`.
        clip_grad: largest norm of the combined gradient, or what `clip_mode` says; None: off.
        clip_mode: see `clip_gradients`.
        dist_bn: "reduce": processes share the mean of their running statistics at the end of each epoch; "broadcast":
            those of the first process are evaluated.
        hyper_schedule: gives the hyper-parameters of the next step from the number of steps made; None: they stay.
        perturb_from_epoch: the first epoch with second passes, counted from 1; the steps before it are plain.
        ema: timm's ModelEmaV3 of the unwrapped model; it is what is evaluated. None: off.
        log_interval: steps between log lines where there is no progress bar.
        skip_bad: the loaders pass over bad images; each epoch's metrics count them.
        skip_nonfinite: leave out steps whose loss or gradient is not finite, and count them in each epoch's metrics;
            False: such a step raises `NonFinite`. See `apart_hf.training.nonfinite.Guard`.
        val_interval: epochs from one evaluation to the next; the last epoch is always evaluated.
        after_step: called after each optimizer step, when all of `state` is as it will be found again.
        cuda_graph: replay steps as CUDA graphs, where there are no `step_graph.obstacles`; a line names those.
        figures: tells what training shows by step, before `after_step`; None: nobody is told.

    `progress` says how far it is, `guard` judges the steps.
    """

    accelerator: Accelerator
    model: nn.Module
    strategy: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    criterion: Callable[[Tensor, Tensor], Tensor]
    train_loader: Any
    val_loader: Any
    mixup: Callable | None = None
    clip_grad: float | None = None
    clip_mode: ClipMode = "norm"
    dist_bn: Literal["broadcast", "reduce"] = "broadcast"
    hyper_schedule: Callable[[int], dict[str, float]] | None = None
    perturb_from_epoch: int = 1
    ema: ModelEmaV3 | None = None
    log_interval: int = 50
    skip_bad: bool = False
    skip_nonfinite: bool = False
    val_interval: int = 1
    after_step: Callable[[], None] | None = None
    cuda_graph: bool = False
    figures: StepFigures | None = None

    def __post_init__(self) -> None:
        self.guard = Guard(
            self.accelerator,
            self.model,
            self.optimizer,
            ema=self.ema,
            skip=self.skip_nonfinite,
            interval=self.log_interval,
            holder=self.strategy,
        )
        self.progress = Progress(self.accelerator.device)
        self._step = Step(self)
        self.graphs: StepGraphs | None = step_graphs(self, self._step) if self.cuda_graph else None
        self._random: dict[str, Any] | None = None  # to go on from within an epoch

    @property
    def evaluated(self) -> nn.Module:
        """Return the network that is evaluated and exported: the averaged one, where there is one."""
        return self.model if self.ema is None else self.ema.module

    def fit(self, epochs: int, max_steps: int | None = None) -> Iterator[EpochMetrics]:
        """Train, yielding each epoch's metrics, with those of its evaluation where there is one."""
        progress = self.progress
        for epoch in range(progress.epoch, epochs):
            self.train_loader.set_epoch(epoch)
            parts: tuple[Any, ...] = self.train_loader.dataset, self.mixup
            for part in parts:  # on several processes Accelerate does not pass it on
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
            if self.scheduler is not None and epoch:  # as in timm's script, it begins by itself
                self.scheduler.step(epoch)  # does nothing where it goes by update
            plain = "" if progress.reaches(self.perturb_from_epoch) else ", plain"
            trained = self.train_epoch(f"epoch {epoch + 1}/{epochs}{plain}", max_steps)
            lr = learning_rate(self.optimizer)
            progress.end_epoch()
            last, evaluation = progress.is_done(epochs, max_steps), None
            if last or progress.epoch % self.val_interval == 0:
                evaluation = self.evaluate(self.val_loader, SHOWN if last else 0)
                self.guard.check_evaluation(progress.steps, evaluation.eval_loss)
            yield EpochMetrics(
                progress.epoch,
                trained,
                evaluation,
                lr,
                train_skipped=count_skipped(self.accelerator, self.train_loader) if self.skip_bad else None,
                skipped_steps=self.guard.take_skipped() if self.skip_nonfinite else None,
            )
            if last:
                return

    def train_epoch(self, title: str, max_steps: int | None = None) -> TrainedEpoch:
        """Pass over the training data once, or over what is left of it."""
        self.model.train()
        progress, length = self.progress, len(self.train_loader)
        accumulated = self.accelerator.gradient_accumulation_steps
        to_make = progress.batches_until(max_steps, length, accumulated)
        report = EpochReport(progress, self.accelerator, title, to_make, self.log_interval)
        rest = length % accumulated  # batches in the last step of the epoch, where they are fewer
        batches = () if progress.has_made(max_steps) else self._batches()  # none, where it is resumed at its end
        for number, (images, labels) in report.over(batches):
            targets = labels
            if self.mixup is not None:
                images, targets = self.mixup(images, labels)
                labels = targets.argmax(-1)  # the heavier of the two
            share = accumulated / rest if number > length - rest else 1.0
            loss, output = self.train_step(images, targets, share)
            progress.count(loss, output, labels)
            progress.batch = number
            if self.accelerator.sync_gradients:
                progress.end_step(made=self.guard.good)
                if self.figures is not None:
                    self.figures.end_step()
                if self.dist_bn == "reduce" and (number == length or progress.has_made(max_steps)):
                    average_statistics(self.accelerator, self.model, self.evaluated)
                if self.after_step is not None:
                    self.after_step()
            if report.show(number, learning_rate(self.optimizer)):
                say_warning(self.train_loader)
            if progress.has_made(max_steps):
                break
        say_warning(self.train_loader)
        measured, samples = report.measured()
        self.guard.check_epoch(progress.steps, samples)
        self.guard.check_state(progress.steps)  # before it is evaluated and exported
        return measured

    def train_step(self, images: Tensor, targets: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Compute the gradient of one batch, and make an optimizer step where enough of them are accumulated.

        Args:
            images, targets: (M, ...) the batch, and its class indices or soft labels.
            share: weight of this batch in the step, relative to an equal part of `gradient_accumulation_steps`.

        Returns:
            Loss and output of the clean pass.

        Raises:
            NonFinite: where the step is not finite and is not to be left out.
        """
        return self._step(images, targets, share)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the batches of this epoch that are still to come."""
        loader = self.train_loader
        if self.progress.batch:
            loader = self.accelerator.skip_first_batches(loader, self.progress.batch)
            loader.set_epoch(self.progress.epoch)
        for batch in loader:
            self._restore_random()
            yield batch
        self._restore_random()  # no batch was left

    def _restore_random(self) -> None:
        """Set the random numbers of a checkpoint within an epoch: making the loader drew from them."""
        if self._random is not None:
            set_random_state(self._random)
            self._random = None

    def state(self) -> tuple[TrainerState, ProcessState]:
        """Return what Accelerate does not keep.

        Raises:
            NonFinite: where any of the state is not finite: there is nothing to go on from.
        """
        progress = self.progress
        self.guard.check_state(progress.steps)
        shared = TrainerState(
            progress.steps,
            progress.epoch,
            progress.batch,
            None if self.scheduler is None else self.scheduler.state_dict(),
            None if self.ema is None else self.ema.state_dict(),
            self.guard.state_dict(),
        )
        totals = None if progress.totals is None else progress.totals.cpu()
        skipped = self.train_loader.dataset.skipped_rows() if self.skip_bad else []
        figures = None if self.figures is None else self.figures.sums.cpu()
        means = running_statistics(self.ema.module) if self.ema is not None and self.dist_bn == "reduce" else None
        return shared, ProcessState(totals, self.strategy.state_dict(), skipped, random_state(), figures, means)

    def load_state(self, shared: TrainerState, own: ProcessState) -> None:
        """Go on from what `state` returned."""
        progress = self.progress
        progress.steps, progress.epoch, progress.batch = shared.steps, shared.epoch, shared.batch
        if self.scheduler is not None and shared.scheduler is not None:
            self.scheduler.load_state_dict(shared.scheduler)
        if self.ema is not None and shared.ema is not None:
            self.ema.load_state_dict(shared.ema)
            self.ema.module.load_state_dict(own.statistics or {}, strict=False)
        self.guard.load_state_dict(shared.guard)
        if self.graphs is not None:
            self.graphs.forget()
        self.strategy.load_state_dict({"steps": progress.steps, **own.strategy})  # 0.1.0 did not keep them there
        progress.totals = None if own.totals is None else own.totals.to(self.accelerator.device)
        if self.figures is not None and own.figures is not None:
            self.figures.sums = own.figures
        if self.skip_bad:
            self.train_loader.dataset.mark_skipped(own.skipped if progress.batch else [])
        self._random = own.random if progress.batch else None
        set_random_state(own.random)

    @torch.no_grad()
    def evaluate(self, loader: Iterable, mistakes: int = 0) -> Evaluation:
        """Measure `evaluated`, see `evaluate`; count the images that were left out where that may be."""
        found = evaluate(with_first_buffers(self.accelerator, self.evaluated), loader, self.accelerator, mistakes)
        return replace(found, eval_skipped=count_skipped(self.accelerator, loader)) if self.skip_bad else found
