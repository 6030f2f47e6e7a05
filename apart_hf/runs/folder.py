"""What a run leaves in OUTPUT/EXPERIMENT/: settings, metrics, best/, last/, plots/, checkpoints/, test.json."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors.torch import load_file
from torch import nn

from apart_hf.config.train_config import TrainConfig
from apart_hf.config.yaml_file import write_config
from apart_hf.data import ImageData, Split
from apart_hf.data.fingerprint import data_digest
from apart_hf.errors import ApartError
from apart_hf.hub.export import copy_folder, export_folder
from apart_hf.hub.model_folder import update_record
from apart_hf.runs.checkpoints import Checkpoints
from apart_hf.runs.report import plot_training
from apart_hf.runs.resume import check_unchanged, lock, place
from apart_hf.training.trainer import Trainer
from apart_hf.utils.files import write_whole, writing
from apart_hf.utils.processes import from_main_process

PLOT_SECONDS = 10  # drawing takes half a second or more, which is much of a short epoch


class RunFolder:
    """Makes the folder, then records one epoch at a time there and in the trackers.

    Args:
        config: resolved; its hyper-parameters are completed by `hyper`.
        images: timm's description of the evaluation images.
        data: names the classes.
        hyper: the strategy's hyper-parameters.
        record: what the exported folders say of the training, see `training_record`.
        accelerator: only its main process writes.

    With `config.resume`, the folder of an earlier run is gone on with: `checkpoint` is where, and `history` what it had
    recorded by then.

    Raises: ApartError where the folder exists or cannot be made (then nothing was written), is in use, or belongs to a
        run with other settings.
    """

    def __init__(
        self,
        config: TrainConfig,
        images: dict[str, Any],
        data: ImageData,
        hyper: dict[str, Any],
        record: dict[str, Any],
        accelerator: Accelerator,
    ):
        self.images, self.data, self.record, self.accelerator = images, data, record, accelerator
        self.history: list[dict[str, float]] = []
        self._plotted = time.monotonic()
        self.folder, self._new = from_main_process(accelerator, lambda: make_folder(config))
        self.config = config = dataclasses.replace(config, experiment=self.folder.name, **hyper)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", accelerator, keep=config.checkpoint_hist)
        self.settings = settings = dataclasses.asdict(config)
        self.digest = data_digest(data)
        self.checkpoint, problems = from_main_process(accelerator, self._open)
        for problem in problems:
            accelerator.print(f"checkpoint {problem}")
        if config.report_to:
            accelerator.project_configuration.logging_dir = str(self.folder)
            scalars = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in settings.items()}
            accelerator.init_trackers("trackers", config=scalars)

    def _open(self) -> tuple[Path | None, list[str]]:
        """Lock the folder and look what is there. Returns: see `Checkpoints.newest`."""
        with writing(self.folder):
            self._lock = lock(self.folder)
            self.checkpoints.recover()
            checkpoint, problems = self.checkpoints.newest()
            if checkpoint is None:
                for name in ("metrics.jsonl", "test.json"):
                    (self.folder / name).unlink(missing_ok=True)
                self._write_settings()
            (self.folder / "plots").mkdir(exist_ok=True)
        return checkpoint, problems

    def _write_settings(self) -> None:
        write_whole(self.folder / "config.yaml", write_config(self.settings))

    def restore(self, trainer: Trainer) -> bool:
        """Bring `trainer` to where the checkpoint is; whether anything is left to do.

        With `override` the optimizer's settings and the schedule are the new ones.

        Raises: ApartError where the checkpoint is of other settings, of other data or of another number of processes,
            or its place cannot be found again. Then nothing was changed.
        """
        if self.checkpoint is None:
            return True
        shared, own = self.checkpoints.read(self.checkpoint)
        check_unchanged(self.folder, shared["settings"], self.settings, self.config.override)
        if shared["data"] != self.digest:
            raise ApartError(
                f"{self.checkpoint} is of other data: their labels or numbers differ; give the same --data-dir and "
                "splits, or start anew with another --experiment."
            )
        if shared["processes"] != self.accelerator.num_processes:
            raise ApartError(
                f"{self.checkpoint} is of {shared['processes']} process(es), and {self.accelerator.num_processes} were "
                "started: each goes on with random numbers and sums of its own; start as many."
            )
        shared["batch"] = place(shared, self._images_a_batch())
        given = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
        self.checkpoints.restore(self.checkpoint)
        if self.config.override:
            shared["scheduler"] = None
            for group, settings in zip(trainer.optimizer.param_groups, given):
                group.update(settings)
        trainer.load_state(shared, own)
        self.history, self.checkpoints.best = shared["history"], shared["best"]
        done = trainer.is_done(self.config.epochs, self.config.max_steps)
        tested = from_main_process(self.accelerator, lambda: self._go_on(done))
        return not done or (self.data.test is not None and not tested)

    def _go_on(self, done: bool) -> bool:
        """Bring the files to where the checkpoint is; whether the test split has been looked at."""
        with writing(self.folder):
            lines = "".join(json.dumps(line) + "\n" for line in self.history)
            write_whole(self.folder / "metrics.jsonl", lines)  # without what was recorded later
            self._write_settings()
            if not done:
                (self.folder / "test.json").unlink(missing_ok=True)
            return (self.folder / "test.json").exists()

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint; where that fails, say so and go on."""
        shared, own = trainer.state()
        best = self.checkpoints.best
        if trainer.batch == 0 and self._best() is self.history[-1]:  # the end of the best epoch so far
            self.checkpoints.best = trainer.steps
        shared |= {
            "history": self.history,
            "best": self.checkpoints.best,
            "images": self._images_a_batch(),
            "settings": self.settings,
            "data": self.digest,
        }
        problem = self.checkpoints.save(trainer.steps, shared, own)
        if problem is not None:
            self.checkpoints.best = best
            kept, _ = from_main_process(self.accelerator, self.checkpoints.newest)
            stays = f"{kept.name} stays" if kept else "there is none yet"
            self.accelerator.print(
                f"warning: no checkpoint at step {trainer.steps} ({problem}); {stays}, and training goes on. Make room "
                f"in {self.folder}.",
                flush=True,
            )

    def _images_a_batch(self) -> tuple[int, int]:
        """Of one process: (in a batch, in an optimizer step)."""
        return self.config.batch_size, self.config.batch_size * self.config.grad_accum_steps

    def add(self, metrics: dict[str, float], model: nn.Module, *, last: bool) -> None:
        """Record one epoch: a line of metrics; where it was evaluated, the weights as last/ and, if best, as best/.

        The curves are drawn after the last epoch, and before that every `PLOT_SECONDS` at most.

        Raises: ApartError where they cannot be written.
        """
        self.history.append(metrics)
        self.accelerator.log({k: v for k, v in metrics.items() if k != "epoch"}, step=metrics["epoch"])
        parts = [
            f"epoch {metrics['epoch']}: train loss {metrics['train_loss']:.3f}, top-1 {metrics['train_top1']:.1f} %",
            f"{metrics['images_per_second']:.0f} images/s, {metrics['seconds']:.1f} s, lr {metrics['lr']:g}",
        ]
        if "top1" in metrics:
            parts.insert(
                1, f"eval loss {metrics['eval_loss']:.3f}, top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} %"
            )
        self.accelerator.print(" | ".join(parts), flush=True)
        if metrics.get("skipped_steps"):
            self.accelerator.print(
                f"epoch {metrics['epoch']}: {metrics['skipped_steps']} step(s) left out for a loss or gradient that "
                "is not finite",
                flush=True,
            )
        if metrics.get("train_skipped") or metrics.get("eval_skipped"):
            self.accelerator.print(
                f"epoch {metrics['epoch']}: images that cannot be decoded: {metrics['train_skipped']} passed over in "
                f"training, {metrics.get('eval_skipped', 0)} left out of the evaluation",
                flush=True,
            )
        if self.accelerator.is_main_process:
            with writing(self.folder):
                self._write(metrics, model)
                if last or ("top1" in metrics and time.monotonic() - self._plotted > PLOT_SECONDS):
                    self._plot()

    def _plot(self) -> None:
        title = f"{self.config.model}, {self.config.method}, {self.config.dataset_name}"
        plot_training(self.history, self.folder / "plots" / "training.png", title)
        gc.collect()  # a figure is a cycle of references, of 3 MB
        self._plotted = time.monotonic()

    def _write(self, metrics: dict[str, float], model: nn.Module) -> None:
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if "top1" not in metrics:
            return
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        export_folder(
            plain,
            self.folder / "last",
            data_config=self.images,
            label_names=self.data.class_names,
            tag=f"{self.config.method}_{self.config.dataset_name}".replace("/", "_").replace(".", "_"),
            apart=self.record | {"results": self._results(metrics)},
            license=self.config.license,
        )
        if self._best() is metrics:
            copy_folder(self.folder / "last", self.folder / "best")

    def test(self, trainer: Trainer, loader: Any) -> dict[str, float]:
        """Evaluate last/ and best/ on the test split, once, and write `test.json`. Returns the result of last/."""
        results = {"split": self.data.test.name}
        results["last"] = {"epoch": self.history[-1]["epoch"], **trainer.evaluate_all(loader)}
        network = self.accelerator.unwrap_model(trainer.evaluated, keep_torch_compile=False)
        if self.accelerator.is_main_process:
            network.load_state_dict(load_file(self.folder / "best" / "model.safetensors"))
        for tensor in network.state_dict().values():  # other machines need not see the folder
            tensor.copy_(broadcast(tensor, from_process=0))
        results["best"] = {"epoch": self._best()["epoch"], **trainer.evaluate_all(loader)}
        for name in ("last", "best"):
            found = results[name]
            self.accelerator.print(
                f"test: split {self.data.test.name!r}, {name} (epoch {found['epoch']}): loss {found['eval_loss']:.3f}, "
                f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %"
                + (f"; {found['eval_skipped']} bad images left out" if found.get("eval_skipped") else "")
            )
        from_main_process(self.accelerator, lambda: self._record_test(results))
        return results["last"]

    def _record_test(self, results: dict[str, Any]) -> None:
        with writing(self.folder):
            for name in ("last", "best"):
                claim = _claim(results[name], self.data.test, results[name].get("eval_skipped", 0))
                update_record(self.folder / name, results={"split": self.data.test.name, **claim})
            # last: it says that all is done
            write_whole(self.folder / "test.json", json.dumps(results, indent=2) + "\n")

    def _results(self, metrics: dict[str, float]) -> dict[str, Any]:
        """What is claimed of weights: the evaluation after their epoch."""
        part = "" if self.config.val_fraction is None else f" ({self.config.val_fraction:g} of it, for validation)"
        return {"split": self.data.val.name + part, **_claim(metrics, self.data.val, metrics.get("eval_skipped", 0))}

    def _best(self) -> dict[str, float] | None:
        """The metrics of the best epoch that was evaluated, the later of equals; None: none was."""
        metric, sign = self.config.eval_metric, -1 if self.config.eval_metric == "eval_loss" else 1

        def rank(line: dict[str, float]) -> float:
            return -math.inf if math.isnan(line[metric]) else sign * line[metric]

        return max((line for line in reversed(self.history) if metric in line), key=rank, default=None)

    def discard_if_empty(self) -> None:
        """Remove the folder that this run has made, where it ends before its first epoch or checkpoint."""
        if self.accelerator.is_main_process and self._new and not self.history and not self.checkpoints.all():
            shutil.rmtree(self.folder)


def _claim(metrics: dict[str, float], split: Split, skipped: int) -> dict[str, Any]:
    """Of weights: epoch, figures, and the number of images that they are of."""
    found = {key: metrics[key] for key in ("epoch", "top1", "top5", "eval_loss")}
    images = {} if split.size is None else {"images": len(split) - skipped}
    return found | images | ({"skipped": skipped} if skipped else {})


def make_folder(config: TrainConfig) -> tuple[Path, bool]:
    """The folder of a run, and whether it is a new one.

    Raises: ApartError where it cannot be made, or holds what is not a run's.
    """
    folder = Path(config.output) / (config.experiment or _name(config))
    if config.resume not in (None, "auto"):
        folder = Path(config.resume)
        if not os.path.isdir(folder / "checkpoints"):
            raise ApartError(f"--resume {folder}: there is no checkpoint; name a run's folder, or use --resume auto.")
    elif config.experiment is None:
        *there, free = _numbered(folder)
        folder = there[-1] if config.resume and there else free
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


def _numbered(folder: Path) -> list[Path]:
    """The folder and those of the same name, numbered from 2, that are there; then the first that is not."""
    names = [folder]
    while os.path.exists(names[-1]):  # False for a name that no file can have
        names.append(folder.with_name(f"{folder.name}-{len(names) + 1}"))
    return names
