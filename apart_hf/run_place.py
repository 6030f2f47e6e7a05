"""Where a run goes: a new folder, or that of the run which is gone on with."""

from __future__ import annotations

import os
from pathlib import Path

from apart_hf.config import TrainConfig
from apart_hf.errors import ApartError


def make_folder(config: TrainConfig) -> tuple[Path, bool]:
    """The folder of a run, and whether it is a new one.

    Raises: ApartError where it cannot be made, or holds what is not a run's.
    """
    folder = Path(config.output) / (config.experiment or _name(config))
    if config.resume not in (None, "auto"):
        folder = Path(config.resume)
        if not os.path.isdir(folder / "checkpoints"):
            raise ApartError(f"--resume {folder}: there is no checkpoint; name a run's folder, or use --resume auto.")
    elif config.resume is None and config.experiment is None:
        folder = _free(folder)
    new = not os.path.exists(folder)
    if config.resume == "auto" and os.path.isdir(folder) and not _is_run(folder) and os.listdir(folder):
        raise ApartError(f"--resume auto: {folder} holds other files than a run's; choose another --experiment.")
    try:
        folder.mkdir(parents=True, exist_ok=config.resume is not None)
    except FileExistsError as error:
        raise ApartError(
            f"{folder} exists already; choose another --experiment or --output, or go on with it by --resume."
        ) from error
    except (OSError, ValueError) as error:  # a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise ApartError(f"cannot write {folder}: {reason}; choose another --output.") from error
    return folder, new


def _is_run(folder: Path) -> bool:
    """Also one whose checkpoints were removed."""
    return (folder / "checkpoints").is_dir() or ((folder / "config.yaml").is_file() and (folder / "plots").is_dir())


def _name(config: TrainConfig) -> str:
    return "-".join(part.replace("/", "_") for part in (config.dataset_name, config.model, config.method))


def _free(folder: Path) -> Path:
    """The folder, numbered where such a run is there already."""
    taken, number = folder, 1
    while os.path.exists(taken):  # False for a name that no file can have
        number += 1
        taken = folder.with_name(f"{folder.name}-{number}")
    return taken
