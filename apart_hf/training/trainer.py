"""The Accelerate training loop. It knows nothing of strategies beyond `accumulate_gradients` and their state."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, tqdm
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from apart_hf.training.evaluation import evaluate
from apart_hf.training.nonfinite import Guard
from apart_hf.training.random_state import set_random_state


@dataclass
class Trainer:
    """Trains and evaluates a model, one epoch at a time.

    Args:
        accelerator: has prepared model, optimizer and loaders.
        model: in any wrapper.
        strategy: its `accumulate_gradients` fills p.grad.
        optimizer: stepped once in as many batches as the accelerator accumulates.
        scheduler: timm's, stepped by update; None: a constant learning rate.
        criterion: criterion(output, targets) -> mean loss; takes soft targets where `mixup` makes them.
        train_loader, val_loader: batches of (images, class indices).
        mixup: timm's Mixup, drawn once a batch and so the same in both passes; None: off.
        clip_grad: largest norm of the combined gradient; None: off.
        every: the second pass is made in every so-manieth step; the others are plain steps.
        ema: timm's ModelEmaV3 of the unwrapped model; it is what is evaluated. None: off.
        log_interval: steps between log lines where there is no progress bar.
        skip_bad: the loaders pass over bad images; each epoch's metrics count them.
        skip_nonfinite: leave out steps whose loss or gradient is not finite, and count them in each epoch's metrics;
            False: such a step raises `NonFinite`. See `apart_hf.training.nonfinite.Guard`.
        val_interval: epochs from one evaluation to the next; the last epoch is always evaluated.
        after_step: called after each optimizer step, when all of `state` is as it will be found again.
        steps, epoch, batch, totals: how far it is: optimizer steps in all; whole epochs; batches of this epoch, and
            their sums of loss, hits and samples.
        random: state of the random numbers to go on from in the midst of an epoch, see `load_state`.
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
    every: int = 1
    ema: ModelEmaV3 | None = None
    log_interval: int = 50
    skip_bad: bool = False
    skip_nonfinite: bool = False
    val_interval: int = 1
    after_step: Callable[[], None] | None = None
    steps: int = 0
    epoch: int = 0
    batch: int = 0
    totals: Tensor | None = None
    random: dict[str, Any] | None = None

    def __post_init__(self):
        self.guard = Guard(self.accelerator, self.model, self.optimizer, ema=self.ema, skip=self.skip_nonfinite)

    def fit(self, epochs: int, max_steps: int | None = None) -> Iterator[dict[str, float]]:
        """Train, yielding each epoch's metrics (see `metrics.jsonl`), those of its evaluation where there is one."""
        for epoch in range(self.epoch, epochs):
            self.train_loader.set_epoch(epoch)
            dataset = self.train_loader.dataset
            if hasattr(dataset, "set_epoch"):  # on several processes Accelerate does not pass it on
                dataset.set_epoch(epoch)
            trained = self.train_epoch(f"epoch {epoch + 1}/{epochs}", max_steps)
            lr = self.optimizer.param_groups[0]["lr"]
            self.epoch, self.batch, self.totals = epoch + 1, 0, None
            last = self.is_done(epochs, max_steps)
            evaluated = {}
            if last or self.epoch % self.val_interval == 0:
                evaluated = self.evaluate_all(self.val_loader)
                self.guard.check_evaluation(self.steps, evaluated["eval_loss"])
            metrics = {"epoch": self.epoch, **trained, **evaluated, "lr": lr}
            if self.skip_bad:
                metrics["train_skipped"] = self._skipped(self.train_loader)
            if self.skip_nonfinite:
                metrics["skipped_steps"] = self.guard.take_skipped()
            yield metrics
            if last:
                return

    def is_done(self, epochs: int, max_steps: int | None) -> bool:
        """Whether so many epochs, or optimizer steps, have been made and what is due after them; None: no such end."""
        return self.epoch >= epochs or (self.batch == 0 and self.has_made(max_steps))

    def has_made(self, max_steps: int | None) -> bool:
        """Whether so many optimizer steps have been made; None: there is no such end."""
        return max_steps is not None and self.steps >= max_steps

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and exported: the averaged one, where there is one."""
        return self.model if self.ema is None else self.ema.module

    def train_step(self, images: Tensor, targets: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """The gradient of one batch, and an optimizer step where the accelerator has accumulated enough of them.

        Args:
            images, targets: (M, ...) the batch, and its class indices or soft labels.
            share: weight of this batch in the step, relative to an equal part of `gradient_accumulation_steps`.

        Returns: loss and output of the clean pass.

        Raises: NonFinite where the step is not finite and is not to be left out.
        """
        if self.scheduler is not None:
            self.scheduler.step_update(self.steps)
        with self.accelerator.accumulate(self.model):
            self.guard.before()
            loss, output = self.strategy.accumulate_gradients(
                images,
                targets,
                self.criterion,
                perturb=(self.steps + 1) % self.every == 0,
                backward=lambda loss: self.accelerator.backward(loss if share == 1.0 else loss * share),
            )
            good = self.guard.judge(self.steps + 1, images, loss)  # False before the last batch of a step
            if good:
                if self.clip_grad is not None:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_grad)
                self.optimizer.step()
                self.guard.after(self.steps + 1)
            self.optimizer.zero_grad()  # Accelerate's: does nothing before the last batch of a step
        if self.accelerator.sync_gradients:
            self.steps += 1
            if good and self.ema is not None:
                self.ema.update(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), step=self.steps)
        return loss, output

    def train_epoch(self, title: str, max_steps: int | None = None) -> dict[str, float]:
        """One pass over the training data. Means are over all samples of all processes."""
        self.model.train()
        if self.totals is None:
            self.totals = torch.zeros(3, device=self.accelerator.device)  # loss sum, hits, samples
        totals, of_step, first = self.totals, torch.zeros_like(self.totals), self.batch
        seen_before = totals[2].item()
        processes, shown, start = self.accelerator.num_processes, first, time.perf_counter()
        on_terminal = sys.stderr.isatty()
        accumulated = self.accelerator.gradient_accumulation_steps
        rest = len(self.train_loader) % accumulated  # batches in the last step of the epoch, where they are fewer
        batches = () if self.has_made(max_steps) else self._batches()  # none, where it is resumed at its end
        bar = tqdm(
            batches,
            main_process_only=True,
            desc=title,
            unit="step",
            leave=False,
            initial=first,
            total=len(self.train_loader),
            disable=not (on_terminal and self.accelerator.is_local_main_process),
        )
        for step, (images, labels) in enumerate(bar, start=first + 1):
            targets = labels
            if self.mixup is not None:
                images, targets = self.mixup(images, labels)
                labels = targets.argmax(-1)  # the heavier of the two
            in_rest = step > len(self.train_loader) - rest
            loss, output = self.train_step(images, targets, accumulated / rest if in_rest else 1.0)
            hits = (output.argmax(-1) == labels).sum()
            of_step += torch.stack([loss * len(images), hits, hits.new_tensor(len(images))]).to(totals)
            if self.accelerator.sync_gradients:
                if self.guard.good:
                    totals += of_step
                of_step.zero_()
            self.batch = step
            if self.accelerator.sync_gradients and self.after_step is not None:
                self.after_step()
            if step - shown >= self.log_interval or (on_terminal and step - shown >= 5):
                loss_sum, correct, seen = totals.tolist()
                rate = (seen - seen_before) * processes / (time.perf_counter() - start)
                seen = seen or math.nan  # every step so far was left out
                figures = f"loss {loss_sum / seen:.3f}, top-1 {100 * correct / seen:.1f} %, {rate:.0f} images/s"
                shown = step
                if on_terminal:
                    bar.set_postfix_str(figures)
                else:
                    self.accelerator.print(f"{title}, step {step}/{len(self.train_loader)}: {figures}", flush=True)
            if self.has_made(max_steps):
                break
        bar.close()
        loss_sum, correct, seen = self.accelerator.reduce(totals, "sum").tolist()
        self.guard.check_epoch(self.steps, seen)
        self.guard.check_state(self.steps)  # before it is evaluated and exported
        seconds = time.perf_counter() - start
        return {
            "train_loss": loss_sum / seen,
            "train_top1": 100 * correct / seen,
            "images_per_second": (seen - seen_before * processes) / seconds,
            "seconds": seconds,
        }

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of this epoch that are still to come."""
        loader = self.train_loader
        if self.batch:
            loader = self.accelerator.skip_first_batches(loader, self.batch)
            loader.set_epoch(self.epoch)
        for batch in loader:
            self._restore_random()
            yield batch
        self._restore_random()  # no batch was left

    def _restore_random(self) -> None:
        """The random numbers of a checkpoint within an epoch: making the loader drew from them."""
        if self.random is not None:
            set_random_state(self.random)
            self.random = None

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What Accelerate does not keep: (of all processes, of this one).

        Raises: NonFinite where any of the state is not finite: there is nothing to go on from.
        """
        self.guard.check_state(self.steps)
        shared = {
            "steps": self.steps,
            "epoch": self.epoch,
            "batch": self.batch,
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "guard": self.guard.state_dict(),
        }
        totals = None if self.totals is None else self.totals.cpu()
        skipped = self.train_loader.dataset.skipped_rows() if self.skip_bad else []
        return shared, {"totals": totals, "strategy": self.strategy.state_dict(), "skipped": skipped}

    def load_state(self, shared: dict[str, Any], own: dict[str, Any]) -> None:
        """The reverse of `state`, with the random numbers of `own`."""
        self.steps, self.epoch, self.batch = shared["steps"], shared["epoch"], shared["batch"]
        if self.scheduler is not None and shared["scheduler"] is not None:
            self.scheduler.load_state_dict(shared["scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict(shared["ema"])
        self.guard.load_state_dict(shared["guard"])
        self.strategy.load_state_dict(own["strategy"])
        self.totals = None if own["totals"] is None else own["totals"].to(self.accelerator.device)
        if self.skip_bad:
            self.train_loader.dataset.mark_skipped(own["skipped"] if self.batch else [])
        self.random = own["random"] if self.batch else None
        set_random_state(own["random"])

    @torch.no_grad()
    def evaluate(self, loader: Iterable) -> dict[str, float]:
        """Loss and accuracy of `evaluated`, see `apart_hf.training.evaluation`."""
        network = self.evaluated
        if self.accelerator.num_processes > 1:
            # running statistics differ by rank; those of rank 0 are exported, so they are what is measured
            for buffer in network.buffers():
                buffer.copy_(broadcast(buffer, from_process=0))
            network = self.accelerator.unwrap_model(network, keep_torch_compile=False)
        return evaluate(network, loader, self.accelerator)

    def evaluate_all(self, loader: Any) -> dict[str, float]:
        """The same, with the number of images that were left out where that may be."""
        return self.evaluate(loader) | ({"eval_skipped": self._skipped(loader)} if self.skip_bad else {})

    def _skipped(self, loader: Any) -> int:
        """Images of a loader that all processes have passed over since the last call."""
        count = torch.tensor(loader.dataset.take_skipped(), device=self.accelerator.device)
        return int(self.accelerator.reduce(count, "sum"))
