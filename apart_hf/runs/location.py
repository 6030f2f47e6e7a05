"""Where a run goes: a new folder, or that of the run which is gone on with."""

from __future__ import annotations

import os
from pathlib import Path

from apart_hf.config.train_config import TrainConfig
from apart_hf.errors import ApartError


def make_folder(config: TrainConfig) -> tuple[Path, bool]:
    """Find and make the folder of a run in one go, so that runs that start together get folders of their own.

    Returns:
        The folder, and whether it is a new one.

    Raises:
        ApartError: where it cannot be made, or holds what is not a run's.
    """
    folder = find_folder(config)
    return folder, _make(folder, config.resume)


def find_folder(config: TrainConfig) -> Path:
    """Find the folder of a run; it need not be there yet.

    Raises:
        ApartError: where `config.resume` names a folder without checkpoints.
    """
    folder = Path(config.output) / (config.experiment or _name(config))
    if config.resume not in (None, "auto"):
        folder = Path(config.resume)
        if not os.path.isdir(folder / "checkpoints"):
            raise ApartError(f"--resume {folder}: there is no checkpoint; name a run's folder, or use --resume auto.")
    elif config.experiment is None:
        *there, free = _numbered(folder)
        folder = there[-1] if config.resume and there else free
    return folder


def _make(folder: Path, resume: str | None) -> bool:
    """Make the folder of a run, or see that it is one that can be gone on with.

    Raises:
        ApartError: where it cannot be made, or holds what is not a run's.
    """
    new = not os.path.exists(folder)
    if resume == "auto" and os.path.isdir(folder) and not _is_run(folder) and os.listdir(folder):
        raise ApartError(f"--resume auto: {folder} holds other files than a run's; choose another --experiment.")
    try:
        folder.mkdir(parents=True, exist_ok=resume is not None)
    except FileExistsError as error:
        raise ApartError(
            f"{folder} exists already; choose another --experiment or --output, or go on with it by --resume."
        ) from error
    except (OSError, ValueError) as error:  # a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise ApartError(f"cannot write {folder}: {reason}; choose another --output.") from error
    return new


def _is_run(folder: Path) -> bool:
    """Tell whether a folder is a run's, also one whose checkpoints were removed."""
    return (folder / "checkpoints").is_dir() or ((folder / "config.yaml").is_file() and (folder / "plots").is_dir())


def _name(config: TrainConfig) -> str:
    return "-".join(part.replace("/", "_") for part in (config.dataset_name, config.model, config.method))


def _numbered(folder: Path) -> list[Path]:
    """List the folder and those of the same name, numbered from 2, that are there; then the first that is not."""
    names = [folder]
    while os.path.exists(names[-1]):  # False for a name that no file can have
        names.append(folder.with_name(f"{folder.name}-{len(names) + 1}"))
    return names
