"""Which run a command goes on with, whether it may, and that no other process is at it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO, Any

from apart_hf.config.train_config import SETTINGS
from apart_hf.errors import ApartError


def lock(folder: Path) -> IO[str]:
    """Take the lock of a run's folder; it is held until the file is closed or the process ends, however it ends.

    Raises: ApartError where another process holds it.
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
    changed = {
        key: f"{key} (was {before.get(key)}, now {value})"
        for key, value in settings.items()
        if key not in free and before.get(key) != value
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


def place(shared: dict[str, Any], images: tuple[int, int]) -> int:
    """How many batches of the epoch a checkpoint is in, for batches of another size.

    Args:
        shared: of the checkpoint.
        images: in a batch, and in an optimizer step, from now on.

    Raises: ApartError where steps, which the schedule counts, are of other sizes, or no batch ends there.
    """
    (batch, step), (before, step_before) = images, shared["images"]
    if step != step_before:
        raise ApartError(
            f"the checkpoint is of {step_before} images a step on each process, now there are {step}, and the schedule "
            "counts steps; keep --batch-size times --grad-accum-steps."
        )
    batches, rest = divmod(shared["batch"] * before, batch)
    if rest:
        raise ApartError(
            f"the checkpoint is {shared['batch']} batches of {before} images in an epoch, where no batch of {batch} "
            "ends; keep --batch-size."
        )
    return batches
