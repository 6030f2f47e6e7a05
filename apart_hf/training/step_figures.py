"""What training shows by step, for trackers: collected on the device, which is asked for it once in so many steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apart_hf.training.progress import learning_rate

if TYPE_CHECKING:
    from apart_hf.training.trainer import Trainer


def gradient_norm(trainer: Trainer) -> Tensor:
    """Compute the Euclidean norm of the gradient of all that is trained: the model, and what its strategy holds."""
    trained = (*trainer.model.parameters(), *trainer.strategy.parameters())
    gradients = [p.grad for p in trained if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


class StepFigures:
    """Tells, every `log_interval` optimizer steps, what training shows; between these it waits for no device.

    Losses and accuracy are means since it was last told, over all processes and without the steps that were left out;
    the learning rate and the norm are those of the step itself, and what perturbations show is of their latest ascent.

    Args:
        trainer: it calls the methods.
        tell: tell(step, figures), on every process.
    """

    def __init__(self, trainer: Trainer, tell: Callable[[int, dict[str, float]], None]):
        self.trainer, self.tell = trainer, tell
        self._of_step = torch.zeros(2, device=trainer.accelerator.device)  # losses of second passes, and how many
        self._sums = torch.zeros_like(self._of_step)
        self._norm: Tensor | None = None

    @property
    def sums(self) -> Tensor:
        """Return, or set, the sums since it last told: losses, hits, samples, losses of second passes, how many."""
        return torch.cat([self.trainer.progress.recent, self._sums])

    @sums.setter
    def sums(self, values: Tensor) -> None:
        self.trainer.progress.recent.copy_(values[:3])
        self._sums.copy_(values[3:])

    def is_due(self, step: int) -> bool:
        """Tell whether it tells something of this optimizer step."""
        return step % self.trainer.log_interval == 0

    def end_batch(self, step: int, good: bool, norm: Tensor | None = None) -> None:
        """Look at a batch after its gradient, before that is clipped.

        Args:
            step: that it belongs to.
            good: the gradient is whole, and the step will be made.
            norm: of the gradient; None: it is still to be clipped, and is computed where it is due.
        """
        loss = self.trainer.strategy.perturbed_loss
        if loss is not None:
            self._of_step += torch.stack([loss, torch.ones_like(loss)]).to(self._of_step)
        if good and self.is_due(step):
            norm = gradient_norm(self.trainer) if norm is None else norm
            scaler = self.trainer.accelerator.scaler
            self._norm = norm if scaler is None else norm / scaler.get_scale()

    def end_step(self) -> None:
        """Tell what is due after a step, which may have been left out."""
        trainer, progress = self.trainer, self.trainer.progress
        if trainer.guard.good:
            self._sums += self._of_step
        self._of_step.zero_()
        if not self.is_due(progress.steps):
            return
        shown = trainer.strategy.figures()
        of_process = torch.stack([value.to(self._sums) for value in shown.values()]) if shown else self._sums[:0]
        joined = trainer.accelerator.reduce(torch.cat([self.sums, of_process]), "sum").tolist()
        loss, hits, samples, perturbed, passes, *values = joined
        self.sums = torch.zeros(5)
        figures = {"lr": learning_rate(trainer.optimizer)}
        if trainer.hyper_schedule is not None:
            figures |= {f"train/{key}": value for key, value in trainer.hyper_schedule(progress.steps - 1).items()}
        if samples:
            figures |= {"train/loss": loss / samples, "train/top1": 100 * hits / samples}
        if self._norm is not None:
            figures["train/grad_norm"] = self._norm.item()  # of the mean over processes, and so the same on all
            self._norm = None
        if passes:
            figures["train/perturbed_loss"] = perturbed / passes
            processes = trainer.accelerator.num_processes
            figures |= {f"train/{name}": value / processes for name, value in zip(shown, values)}
        self.tell(progress.steps, figures)
