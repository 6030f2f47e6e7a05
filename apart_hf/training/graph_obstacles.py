"""What keeps the steps of a training from being recorded as graphs, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf.training.on_device import AverageOnDevice, is_capturable, unwrapped

if TYPE_CHECKING:
    from apart_hf.training.trainer import Trainer


def obstacles(trainer: Trainer) -> Iterator[str]:
    """Name all that a graph of the trainer's steps would compute wrongly, or could not be recorded with."""
    yield from _of_processes(trainer)
    yield from _of_settings(trainer)
    modules = list(trainer.model.modules())
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in modules):
        yield "--torchcompile compiles anew at times of its own"
    if any(getattr(m, "grad_checkpointing", False) for m in modules):
        yield "--grad-checkpointing keeps random states on the host"
    if any(isinstance(m, _BatchNorm) and m.momentum is None for m in modules):
        yield "a BatchNorm layer without momentum asks for the number of its batches (--bn-momentum 0.1)"
    optimizer = unwrapped(trainer.optimizer)
    if not is_capturable(optimizer):
        yield f"the optimizer {type(optimizer).__name__} computes with numbers of the host (--opt sgd and adamw do not)"
    if trainer.ema is not None and not AverageOnDevice.is_plain(trainer.ema):
        yield "the average of the weights is on another device, or of another dtype"
    device, generator = trainer.accelerator.device, trainer.strategy.generator
    if generator is not None and generator.device.type != device.type:
        yield f"the second pass draws its random numbers on {generator.device.type}"


def _of_processes(trainer: Trainer) -> Iterator[str]:
    accelerator = trainer.accelerator
    if accelerator.device.type != "cuda":
        yield f"it trains on {accelerator.device.type}, which has no such graphs"
    if accelerator.num_processes > 1:
        yield f"{accelerator.num_processes} processes share their gradients within a step"
    if accelerator.scaler is not None:
        yield "float16's gradient scaler asks whether a step has overflowed (--amp-dtype bfloat16 has none)"


def _of_settings(trainer: Trainer) -> Iterator[str]:
    batches = trainer.accelerator.gradient_accumulation_steps
    if batches > 1:
        yield f"--grad-accum-steps {batches} makes a step of several batches"
    if trainer.skip_nonfinite:
        yield "--on-nonfinite skip asks for a verdict in each step"
    if trainer.log_interval == 1:
        yield "--log-interval 1 asks for a verdict in each step"
