"""One batch of training: its gradient and, where enough of them are accumulated, an optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from apart_hf.training.clipping import clip_gradients

if TYPE_CHECKING:
    from apart_hf.training.trainer import Trainer


class Step:
    """Makes the parts of a step in their order: gradient, verdict, clipping, the optimizer's update, average.

    Args:
        trainer: whose parts they are; it calls this object once a batch.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def __call__(self, images: Tensor, targets: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Make what `Trainer.train_step` says, as a graph where the trainer has them."""
        trainer = self.trainer
        self._follow_schedules()
        with trainer.accelerator.accumulate(trainer.model):
            return self._in_turn(images, targets, share) if trainer.graphs is None else trainer.graphs(images, targets)

    def _in_turn(self, images: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Make one part after another; the verdict is known before the update."""
        trainer, number = self.trainer, self.trainer.progress.steps + 1
        trainer.guard.before()
        loss, output = self.gradient(images, targets, share)
        good = trainer.guard.judge(number, images, loss)  # False before the last batch of a step
        if trainer.figures is not None:
            trainer.figures.end_batch(number, good)
        if good:
            self.update()
            trainer.guard.after(number)
        trainer.optimizer.zero_grad()  # Accelerate's: does nothing before the last batch of a step
        if trainer.accelerator.sync_gradients:
            trainer.progress.steps = number
            if good and trainer.ema is not None:
                trainer.ema.update(self.network, step=number)
        return loss, output

    @property
    def network(self) -> nn.Module:
        """Return the model without its wrappers."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)

    @property
    def may_perturb(self) -> bool:
        """Tell whether the epoch has second passes."""
        return self.trainer.progress.reaches(self.trainer.perturb_from_epoch)

    def gradient(self, images: Tensor, targets: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Add the gradient of a batch to p.grad, and return loss and output of its clean pass."""
        trainer = self.trainer
        return trainer.strategy.accumulate_gradients(
            images,
            targets,
            trainer.criterion,
            backward=lambda loss: trainer.accelerator.backward(loss if share == 1.0 else loss * share),
            perturb=self.may_perturb,
        )

    def update(self) -> None:
        """Clip the gradient, and let the optimizer move the weights."""
        trainer = self.trainer
        if trainer.clip_grad is not None:
            clip_gradients(
                trainer.accelerator,
                trainer.model,
                trainer.optimizer,
                trainer.clip_grad,
                trainer.clip_mode,
                trainer.strategy.parameters(),
            )
        trainer.optimizer.step()

    def _follow_schedules(self) -> None:
        """Set the learning rate and the hyper-parameters of the step to come."""
        trainer, made = self.trainer, self.trainer.progress.steps
        if trainer.scheduler is not None and made:
            trainer.scheduler.step_update(made)
        if trainer.hyper_schedule is not None:
            trainer.strategy.set(**trainer.hyper_schedule(made))
