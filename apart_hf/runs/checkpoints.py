"""Checkpoints to go on from exactly: written whole or not at all, and read only where they are intact.

A checkpoint is a folder `checkpoints/step-N`: Accelerate's state (weights, optimizer, scaler), `run.pt` (what all
processes share), `process-R.pt` (random numbers and sums of each process) and `manifest.json` with the sha256 of each
file. Nothing in it is read as code: weights are safetensors, the rest goes through torch's `weights_only` reader.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from apart_hf.runs.checkpoint_state import CheckpointState
from apart_hf.training.state import ProcessState
from apart_hf.utils.files import flush, sha256

MANIFEST = "manifest.json"


@dataclass
class Checkpoints:
    """Writes and reads the checkpoints of a run.

    Args:
        folder: of all of them.
        accelerator: holds what was prepared; all its processes take part.
        keep: how many of the latest stay.
        best: the step of one that stays too, whatever its age.
    """

    folder: Path
    accelerator: Accelerator
    keep: int = 2
    best: int | None = None

    def save(self, shared: CheckpointState, own: ProcessState) -> str | None:
        """Write one under a temporary name, flush it, rename it; then remove those that need not stay.

        Args:
            shared: the same on all processes.
            own: this process's.

        Returns:
            Why it could not be written, on every process; None: it was. The earlier ones stay then.
        """
        name = _name(shared.trainer.steps)
        final, temporary = self.folder / name, self.folder / f".{name}"
        problem = None
        for stage in (self._make, self._write, self._seal):
            if problem is None:
                problem = self._together(partial(stage, temporary, final, shared, own))
        if problem is not None and self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        return problem

    def _together(self, stage: Callable[[], None]) -> str | None:
        """Run a stage on all processes; the first problem of any."""
        problem = ""
        try:
            stage()
        except (OSError, RuntimeError, SafetensorError) as error:
            if "DataLoader worker" in str(error):  # torch's watch over loader processes, which raises anywhere
                raise
            problem = " ".join(str(error).split()) or type(error).__name__
        return next((found for found in gather_object([problem]) if found), None)

    def _make(self, temporary: Path, final: Path, shared: CheckpointState, own: ProcessState) -> None:
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def _write(self, temporary: Path, final: Path, shared: CheckpointState, own: ProcessState) -> None:
        self.accelerator.save_state(str(temporary))
        torch.save(vars(own), temporary / f"process-{self.accelerator.process_index}.pt")
        if self.accelerator.is_main_process:
            torch.save(shared.to_dict(), temporary / "run.pt")

    def _seal(self, temporary: Path, final: Path, shared: CheckpointState, own: ProcessState) -> None:
        if not self.accelerator.is_main_process:
            return
        files = [file for file in sorted(temporary.iterdir()) if file.is_file()]
        (temporary / MANIFEST).write_text(json.dumps({file.name: sha256(file) for file in files}, indent=2))
        for path in (*files, temporary / MANIFEST, temporary):
            flush(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        flush(self.folder)
        # later ones are damaged: else this run would have gone on from them
        stay = [folder for folder in self.all() if folder.name <= final.name][-self.keep :]
        best = None if self.best is None else _name(self.best)
        for folder in self.all():
            if folder not in stay and folder.name != best:
                shutil.rmtree(folder, ignore_errors=True)

    def recover(self) -> None:
        """Take what was written whole but not renamed yet, and remove other remains: before a run goes on."""
        for temporary in self.folder.glob(".step-*"):
            final = temporary.with_name(temporary.name[1:])
            if damage(temporary) is None and damage(final) is not None:
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
            else:
                shutil.rmtree(temporary, ignore_errors=True)

    def remove(self, step: int) -> None:
        """Remove the checkpoint of a step, if there is one."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder / _name(step), ignore_errors=True)

    def all(self) -> list[Path]:
        """List every checkpoint, oldest first, intact or not."""
        return sorted(self.folder.glob("step-*"))

    def newest(self) -> tuple[Path | None, list[str]]:
        """Find the latest one that is intact, and say what is wrong with those after it.

        It reads them: for one process.
        """
        problems: list[str] = []
        for folder in reversed(self.all()):
            problem = damage(folder)
            if problem is None:
                return folder, problems
            problems.append(f"{folder.name} is passed over: {problem}")
        return None, problems

    def read(self, folder: Path) -> tuple[CheckpointState, ProcessState | None]:
        """Read what a checkpoint holds of all processes and of this one, which it may not know. This changes nothing.

        Raises:
            ApartError: where it is of a later format.
        """
        own = folder / f"process-{self.accelerator.process_index}.pt"
        shared = CheckpointState.from_dict(_read(folder / "run.pt"), folder)
        return shared, ProcessState(**_read(own)) if own.exists() else None

    def restore(self, folder: Path) -> None:
        """Set weights, optimizer and scaler as they were."""
        self.accelerator.load_state(str(folder))
        self.accelerator.step = 0  # batches since the last optimizer step: checkpoints are written at its end


def _name(step: int) -> str:
    return f"step-{step:08}"


def damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint; None: it is what was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, checksum in manifest.items():
            if sha256(folder / name) != checksum:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"it cannot be read ({type(error).__name__})"
    return None


def _read(file: Path) -> dict[str, Any]:
    return torch.load(file, map_location="cpu", weights_only=True)
