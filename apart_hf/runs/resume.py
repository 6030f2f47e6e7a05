"""Going on with a run: whether it may, from where, and that no other process is at it."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from apart_hf.config.train_config import SETTINGS
from apart_hf.errors import ApartError
from apart_hf.runs.checkpoint_state import CheckpointState
from apart_hf.utils.processes import from_main_process

if TYPE_CHECKING:
    from apart_hf.runs.run import Run


def lock(folder: Path) -> IO[str]:
    """Take the lock of a run's folder; it is held until the file is closed or the process ends, however it ends.

    Raises:
        ApartError: where another process holds it.
    """
    (folder / "checkpoints").mkdir(exist_ok=True)
    file = open(folder / "checkpoints" / ".lock", "a+")  # noqa: SIM115  held for the life of the run
    try:
        # of the process, so that loader processes which outlive it do not hold it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise ApartError(
            f"{folder} is in use by another run{f' (process {holder})' if holder else ''}; wait for it, or choose "
            "another --experiment."
        ) from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def check_unchanged(folder: Path, before: dict[str, Any], settings: dict[str, Any], override: bool) -> None:
    """Raise ApartError, naming all that differ, where a checkpoint is of other settings.

    Args:
        folder: of the run.
        before: settings of the checkpoint.
        settings: those of now.
        override: take the new ones where a run can go on with them.
    """
    free = {key for key in settings if SETTINGS[key].on_resume == "free"}
    if settings["streaming"]:
        free.discard("workers")  # they share the stream out
    was = {
        key: before.get(key, SETTINGS[key].default) for key in settings
    }  # a setting may be newer than the checkpoint
    changed = {
        key: f"{key} (was {was[key]}, now {value})"
        for key, value in settings.items()
        if key not in free and was[key] != value
    }
    if changed and not override:
        raise ApartError(
            f"{folder} was started with other settings: {', '.join(changed.values())}; name them as "
            "before, or add --override."
        )
    fixed = [words for key, words in changed.items() if SETTINGS[key].on_resume == "fixed"]
    if fixed:
        raise ApartError(
            f"{folder} cannot go on with {', '.join(fixed)}, also not by --override; name them as before, "
            "or start anew with another --experiment."
        )


def place(state: CheckpointState, images: tuple[int, int]) -> int:
    """Count the batches of the epoch that a checkpoint is in, for batches of another size.

    Args:
        state: of the checkpoint.
        images: in a batch, and in an optimizer step, from now on.

    Raises:
        ApartError: where steps, which the schedule counts, are of other sizes, or no batch ends there.
    """
    (batch, step), (before, step_before) = images, state.images
    if step != step_before:
        raise ApartError(
            f"the checkpoint is of {step_before} images a step on each process, now there are {step}, and the schedule "
            "counts steps; keep --batch-size times --grad-accum-steps."
        )
    batches, rest = divmod(state.trainer.batch * before, batch)
    if rest:
        raise ApartError(
            f"the checkpoint is {state.trainer.batch} batches of {before} images in an epoch, where no batch of "
            f"{batch} ends; keep --batch-size."
        )
    return batches


def go_on(run: Run) -> bool:
    """Bring a run to where its checkpoint is.

    With `override` the settings of method and optimizer, and the schedule, are the new ones.

    Returns:
        Whether anything is left to do.

    Raises:
        ApartError: where the checkpoint is of other settings, of other data or of another number of processes, or its
            place cannot be found again. Then nothing was changed.
    """
    if run.checkpoint is None:
        return True
    config, trainer = run.config, run.trainer
    state, own = run.checkpoints.read(run.checkpoint)
    check_unchanged(run.folder.path, state.settings, dataclasses.asdict(config), config.override)
    if state.data != run.digest:
        raise ApartError(
            f"{run.checkpoint} is of other data: their labels or numbers differ; give the same --data-dir and splits, "
            "or start anew with another --experiment."
        )
    if state.processes != run.accelerator.num_processes or own is None:
        raise ApartError(
            f"{run.checkpoint} is of {state.processes} process(es), and {run.accelerator.num_processes} were started: "
            "each goes on with random numbers and sums of its own; start as many."
        )
    state.trainer.batch = place(state, run.images_a_batch)
    given = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
    run.checkpoints.restore(run.checkpoint)
    if config.override:
        own.strategy = {key: value for key, value in own.strategy.items() if key in ("steps", "generator", "auxiliary")}
        state.trainer.scheduler = None
        for group, settings in zip(trainer.optimizer.param_groups, given):
            group.update(settings)
    trainer.load_state(state.trainer, own)
    run.history.epochs, run.checkpoints.best = state.history, state.best
    done = trainer.progress.is_done(config.run_epochs, config.max_steps)
    tested = from_main_process(run.accelerator, lambda: run.folder.go_on(run.history, done))
    return not done or (run.data.test is not None and not tested)
