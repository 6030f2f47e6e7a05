"""The trackers of a run: named after its folder, written to there, and gone on with where the run is gone on with."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from apart_hf.config.train_config import SETTINGS, CompleteConfig
from apart_hf.errors import ApartError, first_line
from apart_hf.training.epoch_metrics import EpochMetrics, Evaluation
from apart_hf.training.random_state import random_state, set_random_state
from apart_hf.utils.files import write_whole
from apart_hf.utils.processes import from_main_process

FILE = "trackers.json"  # in a run's folder: what trackers find the run by
# what a line of metrics.jsonl says of training
_OF_EPOCH = {
    "epoch": "epoch",
    "train_loss": "train/epoch_loss",
    "train_top1": "train/epoch_top1",
    "images_per_second": "train/images_per_second",
    "seconds": "train/epoch_seconds",
    "train_skipped": "train/skipped_images",
    "skipped_steps": "train/skipped_steps",
}


@dataclass(frozen=True)
class TrackedRun:
    """Says what trackers are told of a run at its start.

    Args:
        name: that it is shown by.
        folder: where files go, in full.
        id: which no other run has.
        goes_on: it was begun earlier.
        step: optimizer steps that it has made.
        tags: that it is found by, where a tracker has any.
    """

    name: str
    folder: Path
    id: str
    goes_on: bool
    step: int
    tags: tuple[str, ...] = ()


def _comet(run: TrackedRun) -> dict[str, Any]:
    from comet_ml import ExperimentConfig

    return {
        "experiment_key": run.id,
        "experiment_config": ExperimentConfig(name=run.name, offline_directory=str(run.folder / "comet")),
    }


# how accelerate makes each tracker, beside the project; what is not said here would be a random name, or the working
# directory. trackio has one place for all runs (TRACKIO_DIR), and so has mlflow (MLFLOW_TRACKING_URI).
_OPTIONS: Mapping[str, Callable[[TrackedRun], dict[str, Any]]] = {
    # events of steps that will be made again are taken back
    "tensorboard": lambda run: {"purge_step": run.step + 1},
    "wandb": lambda run: {
        "name": run.name,
        "dir": str(run.folder),
        "id": run.id,
        **({"resume": "allow"} if run.goes_on else {}),
        **({"tags": list(run.tags)} if run.tags else {}),
    },
    "trackio": lambda run: {"name": run.name, "resume": "allow" if run.goes_on else "never"},
    "mlflow": lambda run: {"run_name": run.name},
    "clearml": lambda run: {"task_name": run.name},
    "swanlab": lambda run: {"experiment_name": run.name, "logdir": str(run.folder / "swanlog")},
    "dvclive": lambda run: {
        "dir": str(run.folder / "dvclive"),
        "dvcyaml": str(run.folder / "dvclive" / "dvc.yaml"),
        "resume": run.goes_on,
    },
    "comet_ml": _comet,
}


@dataclass
class Trackers:
    """Tells the trackers that the settings name how a run goes; without one it does nothing.

    Its block ends them, also where the run fails.

    Args:
        accelerator: of the run; it makes the trackers.
        config: complete.
        folder: of the run.

    All numbers stand at the optimizer step after which they were found, those of whole epochs too.
    """

    accelerator: Accelerator
    config: CompleteConfig
    folder: Path

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
            self.end(failed=kind is not None)

    @property
    def are_on(self) -> bool:
        """Tell whether the settings name any."""
        return bool(self.config.trackers)

    def start(self, step: int, *, goes_on: bool) -> None:
        """Begin, or go on with what was begun.

        Args:
            step: optimizer steps made so far.
            goes_on: the run has a checkpoint.

        Raises:
            ApartError: where a tracker does not start.
        """
        if not self.are_on:
            return
        drawn = random_state()
        try:
            from_main_process(self.accelerator, lambda: self._start(step, goes_on))
        finally:
            set_random_state(drawn)  # a tracker may draw a name

    def _start(self, step: int, goes_on: bool) -> None:
        known = self._known() if goes_on else {}
        run = TrackedRun(
            self.folder.name,
            self.folder.resolve(),
            known.get("id") or uuid.uuid4().hex,
            bool(known),
            step,
            tuple(self.config.wandb_tags or ()),
        )
        self.accelerator.project_configuration.logging_dir = str(self.folder)
        try:
            self._make(run)
            trackio = {tracker.name: tracker for tracker in self.accelerator.trackers}.get("trackio")
            if trackio is not None:
                # it goes by the name, which a later run of another folder may have as well
                if run.goes_on and trackio.tracker.id != known.get("trackio"):
                    trackio.finish()
                    trackio.init_kwargs["resume"] = "never"
                    trackio.start()
                known["trackio"] = trackio.tracker.id
            write_whole(self.folder / FILE, json.dumps(known | {"id": run.id}, indent=2) + "\n")
            for tracker in self.accelerator.trackers:
                if tracker.name == "aim":
                    tracker.tracker.name = run.name  # accelerate gives it the project's
                if tracker.name != "mlflow" or not run.goes_on:  # it takes a setting once
                    _store(tracker, hyper_parameters(self.config))
        except Exception as error:  # each tracker has its own
            with contextlib.suppress(Exception):
                self.end(failed=True)
            raise ApartError(
                f"--report-to {' '.join(self.config.trackers or ())}: a tracker does not start ({first_line(error)}); "
                "log in to its service, let it work offline (wandb: WANDB_MODE=offline), or leave it out."
            ) from error

    def _make(self, run: TrackedRun) -> None:
        wanted = [str(tracker) for tracker in self.accelerator.log_with]
        options = {name: _OPTIONS[name](run) for name in wanted if name in _OPTIONS}
        self.accelerator.init_trackers(self.config.project, init_kwargs=options)

    def _known(self) -> dict[str, str]:
        """Return what the trackers of this run were found by; nothing, where it had none."""
        try:
            found = json.loads((self.folder / FILE).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def tell_step(self, step: int, figures: dict[str, float]) -> None:
        """Log what training shows in a step."""
        self.accelerator.log(figures, step=step)

    def tell_epoch(self, step: int, metrics: EpochMetrics) -> None:
        """Log what an epoch gave, after its last step."""
        line = metrics.as_line()
        values = {name: line[key] for key, name in _OF_EPOCH.items() if key in line}
        if metrics.evaluation is not None:
            values |= _named("eval", metrics.evaluation)
        self.accelerator.log(values, step=step)

    def tell_test(self, step: int, evaluation: Evaluation) -> None:
        """Log the test split's results, of the weights after the last step."""
        self.accelerator.log(_named("test", evaluation), step=step)

    def end(self, *, failed: bool = False) -> None:
        """End them, as a run that is finished or, where a tracker knows the difference, as one that is not."""
        trackers, self.accelerator.trackers = self.accelerator.trackers, []
        for tracker in trackers:
            if failed and tracker.name == "wandb":
                tracker.tracker.finish(exit_code=1)
            else:
                tracker.finish()


def hyper_parameters(config: CompleteConfig) -> dict[str, Any]:
    """Return every setting that has a value, by name and with its own type; not those that are of the command alone."""
    named = [(name, getattr(config, name)) for name, setting in SETTINGS.items() if setting.role != "command"]
    return {name: value for name, value in named if value is not None}


def _named(prefix: str, evaluation: Evaluation) -> dict[str, float]:
    return {f"{prefix}/{key.removeprefix('eval_')}": value for key, value in evaluation.as_line().items()}


def _store(tracker: GeneralTracker, values: dict[str, Any]) -> None:
    """Hand over settings."""
    if tracker.name != "tensorboard":
        tracker.store_init_configuration(values)
        return
    flat = {key: " ".join(map(str, v)) if isinstance(v, list) else v for key, v in values.items()}
    try:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    except ImportError:  # accelerate takes tensorboardX too
        tracker.store_init_configuration(flat)
        return
    # within the run's own events, so that its curves are compared by them: accelerate makes a run beside it at each
    # start, in which truth values are numbers
    tracker.tracker.file_writer.add_summary(hparams_pb(flat))
    tracker.tracker.flush()
    (Path(tracker.logging_dir) / "hparams.yml").write_text(yaml.safe_dump(values))
