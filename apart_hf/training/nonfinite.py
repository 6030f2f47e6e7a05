"""Steps whose loss or gradient is not finite: found before the weights follow, then left out or the end of the run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from apart_hf.batchnorm.kernels import is_served_by_launches
from apart_hf.errors import ApartError
from apart_hf.training.diagnosis import cause, training_state
from apart_hf.utils.processes import anywhere

PATIENCE = 100  # steps in a row without a usable one, after which a run ends


class NonFinite(ApartError):
    """Tells that training cannot go on from here; at which step, and where the first such value is.

    `state_is_useless`: a checkpoint of this step would only end here again.
    """

    state_is_useless = False


class Guard:
    """Judges every optimizer step before it is made.

    A step is bad where a batch's loss, a running statistic, or a gradient is not finite. All
    processes come to the same verdict. With a gradient scaler, non-finite gradients are its own business, which lowers
    the scale and leaves the step out; loss and statistics are judged there too.

    Where reading a number means to wait for the device, the verdict stays there. A run that a bad step is to end then
    makes it, and ends where the verdict is read: every `interval` steps, before a checkpoint, and as an epoch ends.
    Nothing is kept of what came after the bad step.

    Args:
        accelerator: has prepared model and optimizer.
        model, optimizer: in any wrapper.
        ema: the average of the weights, if any.
        skip: leave bad steps out, which takes one look at the device a step. False: the first one ends the run.
        interval: steps from one look at the device to the next, where looking means to wait.
        holder: has `parameters` and `buffers` that are trained beside the model's; None: there are none.

    `good` is the verdict on the latest step, `skipped` counts the bad ones of an epoch, `in_a_row` the latest ones that
    were bad or left out by the gradient scaler.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        *,
        ema: ModelEmaV3 | None = None,
        skip: bool = False,
        interval: int = 1,
        holder: Any = None,
    ):
        self.interval = 1 if skip or not is_served_by_launches(accelerator.device) else interval
        self.accelerator, self.model, self.optimizer, self.ema, self.skip = accelerator, model, optimizer, ema, skip
        self.good, self.skipped, self.in_a_row = True, 0, 0
        self.network = accelerator.unwrap_model(model, keep_torch_compile=False)
        # a buffer may hold infinities by design, such as a mask
        self._watched = {n: b for n, b in self.network.named_buffers() if b.is_floating_point() and b.isfinite().all()}
        self._held = [] if holder is None else list(holder.parameters())
        buffers = [*self.network.buffers(), *([] if holder is None else holder.buffers())] if skip else []
        self._buffers = [[b for b in buffers if b.dtype == dtype] for dtype in {b.dtype for b in buffers}]
        self._kept = [[b.clone() for b in alike] for alike in self._buffers]  # as they were before the step
        self._within = False  # a step, of which a batch has been seen
        self._suspect: tuple[Tensor, Tensor] | None = None
        self._waits = is_served_by_launches(accelerator.device)
        self._finite = torch.ones((), dtype=torch.bool, device=accelerator.device)  # so far, in the step
        self._bad_step = torch.zeros((), dtype=torch.int64, device=accelerator.device)  # the first one; 0: none

    def before(self) -> None:
        """Prepare for a batch: a step that is left out leaves no trace in running statistics either."""
        if not self._within:
            self._copy(self._buffers, self._kept)
            self._within = True

    def judge(self, step: int, images: Tensor, loss: Tensor) -> bool:
        """Tell, after the gradient of each batch, whether the optimizer's step is to be made.

        Args:
            step: its number, from 1.
            images: of the batch.
            loss: of its clean pass.

        Raises:
            NonFinite: where the run is to end.
        """
        last = self.accelerator.sync_gradients
        finite = torch.stack([loss, *self._sizes(last)]).isfinite().all()
        if self._waits:
            self._finite = self._finite & finite
        elif self._suspect is None and not finite:
            self._suspect = images, loss
        if not last:
            return False
        if self._waits:
            finite, self._finite = self._finite, torch.ones_like(finite)
            if self.interval > 1:
                self._mark(finite, step)
                if step % self.interval:
                    self._within = False
                    return True
                self.look(before=step)
            self._suspect = None if finite else (images, loss)
        self.good = not anywhere(self.accelerator, self._suspect is not None)
        if not self.good:
            self._leave_out(step, *(self._suspect or (images, loss)))
        self._within, self._suspect = False, None
        return self.good

    def note(self, step: Tensor, loss: Tensor) -> None:
        """Judge a step of one batch on the device, which is not asked: `look_when_due` does.

        Args:
            step: its number, as a scalar.
            loss: of its clean pass.
        """
        self._mark(torch.stack([loss, *self._sizes(last=True)]).isfinite().all(), step)

    def _mark(self, finite: Tensor, step: int | Tensor) -> None:
        """Keep the number of the first step that is not finite, in its place."""
        self._bad_step.copy_(torch.where(~finite & (self._bad_step == 0), step, self._bad_step))

    def look_when_due(self, step: int) -> None:
        """Ask the device, every `interval` steps, whether all steps so far were finite.

        Args:
            step: that was made last.

        Raises:
            NonFinite: where one was not.
        """
        if step % self.interval == 0:
            self.look()

    def look(self, before: int | None = None) -> None:
        """Ask the device for the first bad step so far.

        Args:
            before: a step that is judged elsewhere; None: all of them count.

        Raises:
            NonFinite: where there was one on any process.
        """
        if self.interval == 1:
            return
        found = [step for step in gather_object([int(self._bad_step)]) if step and (before is None or step < before)]
        if found:
            raise NonFinite(
                f"step {min(found)}: its loss, a running statistic or the gradient was not finite, which was seen "
                f"{f'at step {before}' if before else 'when the step was over'}, at learning rate {self._lr():g}; "
                "--log-interval 1 says where."
            )

    def after(self, step: int) -> None:
        """Look at the gradient scaler after the optimizer's step.

        Raises:
            NonFinite: where it has given up.
        """
        if not self.optimizer.step_was_skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.in_a_row >= PATIENCE:
            raise NonFinite(
                f"step {step}: the gradient has overflowed in {PATIENCE} steps in a row, at a gradient scale of "
                f"{self.accelerator.scaler.get_scale():g} by now and learning rate {self._lr():g}."
            )

    def check_state(self, step: int) -> None:
        """Check what training leaves: weights, statistics, optimizer and average.

        Raises:
            NonFinite: where any of it is not finite.
        """
        self.look()
        bad = next((name for name in gather_object([self._first_bad()]) if name is not None), None)
        if bad is not None:
            raise NonFinite(f"after step {step}, at learning rate {self._lr():g}, {bad} is not finite.")

    def check_evaluation(self, step: int, loss: float) -> None:
        """Check the loss of an evaluation.

        Raises:
            NonFinite: where the network's weights are finite, but of no use.
        """
        if not math.isfinite(loss):
            found = NonFinite(f"after step {step}, at learning rate {self._lr():g}, the evaluation's loss is {loss:g}.")
            found.state_is_useless = True
            raise found

    def check_epoch(self, step: int, seen: float) -> None:
        """Check that an epoch has trained.

        Raises:
            NonFinite: where no sample of it was `seen` in a step that was made.
        """
        self.look()
        if not seen:
            raise NonFinite(f"step {step}: the whole epoch had no step with finite loss and gradient.")

    def take_skipped(self) -> int:
        """Count the steps left out since the last call."""
        count, self.skipped = self.skipped, 0
        return count

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def _leave_out(self, step: int, images: Tensor, loss: Tensor) -> None:
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        self._copy(self._kept, self._buffers)
        if not self.skip:
            raise NonFinite(f"step {step}: {self._cause(images, loss)}.")
        if anywhere(self.accelerator, self._first_bad() is not None):
            raise NonFinite(f"step {step}: {self._cause(images, loss)}. It is too late to leave the step out.")
        if self.in_a_row >= PATIENCE:
            raise NonFinite(f"step {step}, the {PATIENCE}th in a row to be left out: {self._cause(images, loss)}.")

    def _cause(self, images: Tensor, loss: Tensor) -> str:
        return cause(self.accelerator, self.network, self._watched, images, loss, self._lr())

    def _lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _sizes(self, last: bool) -> Iterable[Tensor]:
        """Return largest values, no sums: finite where running statistics and, as a step ends, gradients are."""
        gradients = [p.grad for p in (*self.network.parameters(), *self._held) if p.grad is not None and p.grad.numel()]
        if self._watched:
            yield from torch._foreach_norm(list(self._watched.values()), math.inf)
        if last and gradients and self.accelerator.scaler is None:
            yield from torch._foreach_norm(gradients, math.inf)

    @staticmethod
    def _copy(source: list[list[Tensor]], target: list[list[Tensor]]) -> None:
        for values, places in zip(source, target):
            torch._foreach_copy_(places, values)

    def _first_bad(self) -> str | None:
        """Name what training carries from step to step and is not finite here; None: all is."""
        state = training_state(self.network, self._watched, self.optimizer, self.ema)
        return next((name for name, tensor in state if not tensor.isfinite().all()), None)
