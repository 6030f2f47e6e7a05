"""What went wrong in a run, in one line each: faults that are neither the user's input nor this program's."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from accelerate.utils.memory import should_reduce_batch_size

from apart_hf.config.train_config import FilledConfig
from apart_hf.errors import ApartError, OneProcessError, first_line
from apart_hf.runs.interruption import ProcessLost
from apart_hf.training.nonfinite import NonFinite

if TYPE_CHECKING:
    from apart_hf.runs.run import Run


def is_out_of_memory(error: Exception) -> bool:
    # the last is all that oneDNN, torch's library of CPU convolutions, says of it
    if isinstance(error, ApartError):  # explained already
        return False
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)
    return known or "could not create a primitive" in str(error)


def out_of_memory(error: Exception, config: FilledConfig, more: str = "") -> ApartError:
    """Make the error that names batch size and image size, and what takes less.

    Args:
        config: its defaults are filled in.
        more: a further sentence.
    """
    size = f" images of {config.img_size} pixels" if config.img_size else ""
    batch, accumulated = config.batch_size, config.grad_accum_steps
    cures = [] if batch == 1 else [f"--batch-size {batch // 2} --grad-accum-steps {2 * accumulated}"]
    cures += [] if config.amp_dtype in ("bfloat16", "float16") else ["--amp"]
    cures += [] if config.grad_checkpointing else ["--grad-checkpointing"]
    cures += [f"--validation-batch-size below {config.validation_batch_size or batch}", "a smaller --img-size"]
    return OneProcessError(
        f"out of memory at --batch-size {batch}{size} ({first_line(error)}); try {', '.join(cures)}.{more}"
    )


def explained(error: Exception, run: Run) -> Exception:
    """Return what to tell the user of an error in training: itself, or one line in its place."""
    config, trainer = run.config, run.trainer
    steps = trainer.progress.steps
    if isinstance(error, NonFinite) and error.state_is_useless:
        run.checkpoints.remove(steps)
    text, (kept, _) = str(error), run.checkpoints.newest()
    last = f"The last good checkpoint is {kept}" if kept else "There is no checkpoint yet"
    go_on = "; to go on from it: --resume auto" if kept else ""
    if isinstance(error, NonFinite):
        lower = [
            "--lr",
            *(f"--{radius}" for radius in ("epsilon", "rho", "gamma") if radius in config.hyper_parameters()),
        ]
        clip = [] if config.clip_grad else ["--clip-grad 1"]
        skip = [] if config.on_nonfinite == "skip" else ["--on-nonfinite skip"]
        cures = ", ".join([f"a lower {' or '.join(lower)}", *clip, "--warmup-epochs", *skip])
        return ApartError(f"{text} {last}{go_on}{' --override' if kept else ''}. Try {cures}.")
    if "without overflow" in text:  # torch's, of a number that a tensor does not take
        lr = trainer.optimizer.param_groups[0]["lr"]
        return ApartError(
            f"step {steps + 1}: the optimizer computes with a number beyond float32, at learning rate {lr:g} "
            f"and --weight-decay {config.weight_decay:g}; lower them. {last}."
        )
    if is_out_of_memory(error):
        return out_of_memory(error, config, f" {last}{go_on}{' --override' if kept else ''}.")
    worker = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", text)
    if worker:
        line = (
            f"loader process {worker[1]} is gone after step {steps}, most likely killed for lack of memory or "
            f"of shared memory (/dev/shm); take fewer than --workers {config.workers}, or --loader memory. {last}."
        )
        return ProcessLost(line) if kept else OneProcessError(line)
    if "Expected more than 1 value per channel" in text:  # torch's, in a plain pass
        return ApartError(
            f"a BatchNorm layer has one value per channel in a batch ({first_line(error)}); use a larger "
            "--batch-size or --img-size."
        )
    return error
