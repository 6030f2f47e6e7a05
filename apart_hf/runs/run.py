"""A prepared run: it trains, and it is finished."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from apart_hf.config.train_config import CompleteConfig
from apart_hf.data import ImageData, Loaders
from apart_hf.errors import ApartError
from apart_hf.hub.publish import push
from apart_hf.models import is_registered_here
from apart_hf.runs.checkpoint_state import CheckpointState
from apart_hf.runs.checkpoints import Checkpoints
from apart_hf.runs.closer_look import look_closer
from apart_hf.runs.failures import explained
from apart_hf.runs.folder import RunFolder
from apart_hf.runs.history import History
from apart_hf.runs.interruption import Schedule, StopRequest
from apart_hf.runs.report import describe_epoch
from apart_hf.runs.test_split import evaluate_test
from apart_hf.runs.trackers import Trackers
from apart_hf.training.epoch_metrics import Evaluation
from apart_hf.training.step_figures import StepFigures
from apart_hf.training.trainer import Trainer
from apart_hf.utils.processes import from_main_process

_log = logging.getLogger(__name__)
WATCH_SECONDS = 1.0  # in which torch hears that a loader process has ended


@dataclass
class Run:
    """Holds one training run, made by `prepare`.

    Args:
        config: complete.
        accelerator: of its processes.
        data, loaders: what is trained and evaluated on.
        trainer: the loop.
        folder: its files.
        is_new: the folder was made for this run.
        checkpoints: to go on from.
        checkpoint: the one that it goes on from; None: it starts anew.
        digest: hash of the data.
        stop: whether a signal has asked it to stop.

    `history` holds the metrics of its epochs, `is_left` says whether anything is left to do, `trackers` are told.
    """

    config: CompleteConfig
    accelerator: Accelerator
    data: ImageData
    loaders: Loaders
    trainer: Trainer
    folder: RunFolder
    is_new: bool
    checkpoints: Checkpoints
    checkpoint: Path | None
    digest: str
    stop: StopRequest

    def __post_init__(self) -> None:
        self.history = History(self.config.eval_metric)
        self.is_left = True
        self.trackers = Trackers(self.accelerator, self.config, self.folder.path)
        if self.trackers.are_on:
            self.trainer.figures = StepFigures(self.trainer, self.trackers.tell_step)

    @property
    def images_a_batch(self) -> tuple[int, int]:
        """Return the images of one process in a batch, and in an optimizer step."""
        return self.config.batch_size, self.config.batch_size * self.config.grad_accum_steps

    def epoch_ends(self) -> tuple[float | None, bool] | None:
        """Tell whether the epoch ends with the step just made.

        Returns:
            How many images are then evaluated, as a multiple of those of a step (None: there is no evaluation), and
            whether the training ends, too; None: the epoch goes on.
        """
        config, trainer, progress = self.config, self.trainer, self.trainer.progress
        over = progress.has_made(config.max_steps)
        if progress.batch < len(trainer.train_loader) and not over:
            return None
        epoch = progress.epoch + 1
        last = over or epoch >= config.run_epochs
        if not last and epoch % config.val_interval:
            return None, last
        images = self.data.val.size or self.data.train.size or 0  # the former is not known of some streams
        return images / (self.images_a_batch[1] * self.accelerator.num_processes), last

    def fit(self) -> None:
        """Train what is left of the epochs; record each, and write checkpoints.

        Raises:
            ApartError: where it cannot go on.
            Interrupted: where it was asked to stop, or a process is lost, and it can be resumed.
        """
        config, trainer, progress = self.config, self.trainer, self.trainer.progress
        if not self.is_left:
            _log.info("%s is finished: %d epochs, %d steps.", self.folder.path, progress.epoch, progress.steps)
            return
        if self.checkpoint is not None:
            _log.info("resumed from %s: epoch %d, %d batches in.", self.checkpoint, progress.epoch + 1, progress.batch)
        trainer.after_step = schedule = Schedule(config.checkpoint_interval, self)
        try:
            self.trackers.start(progress.steps, goes_on=self.checkpoint is not None)
            with self.stop.noting():
                schedule.begin()
                for metrics in trainer.fit(config.run_epochs, config.max_steps):
                    self.history.epochs.append(metrics)
                    done = progress.is_done(config.run_epochs, config.max_steps)
                    self._record(last=done)
                    self.save()
                    schedule.check(evaluated=metrics.evaluation is not None, done=done)
        except Exception as error:
            told = self._told(error)
            if told is error:
                raise
            raise told from error

    def _record(self, *, last: bool) -> None:
        """Say and write what the latest epoch gave."""
        self.trackers.tell_epoch(self.trainer.progress.steps, self.history.latest)
        for text in describe_epoch(self.history.latest):
            _log.info(text)
        if self.accelerator.is_main_process:
            network = self.accelerator.unwrap_model(self.trainer.evaluated, keep_torch_compile=False)
            self.folder.add(self.history, network, last=last)
            if last and self.data.test is None:
                look_closer(self, self.data.val, self.trainer.val_loader, self.history.latest_evaluation)

    def save(self) -> None:
        """Write a checkpoint; where that fails, say so and go on."""
        shared, own = self.trainer.state()
        best = self.checkpoints.best
        if shared.batch == 0 and self.history.best() is self.history.latest:  # the end of the best epoch so far
            self.checkpoints.best = shared.steps
        state = CheckpointState(
            shared,
            self.history.epochs,
            self.checkpoints.best,
            self.images_a_batch,
            dataclasses.asdict(self.config),
            self.digest,
            self.accelerator.num_processes,
        )
        problem = self.checkpoints.save(state, own)
        if problem is not None:
            self.checkpoints.best = best
            kept, _ = from_main_process(self.accelerator, self.checkpoints.newest)
            stays = f"{kept.name} stays" if kept else "there is none yet"
            _log.warning(
                f"warning: no checkpoint at step {shared.steps} ({problem}); {stays}, and training goes on. Make room "
                f"in {self.folder.path}."
            )

    def _told(self, error: Exception) -> Exception:
        """Explain an error, see `explained`. torch's watch over loader processes may interrupt that, too.

        The pipe to a process that was killed may end before the watch, which names the process, hears of it.
        """
        while True:
            try:
                if isinstance(error, (EOFError, ConnectionError)):
                    time.sleep(WATCH_SECONDS)
                self._discard_if_empty()
                return explained(error, self)
            except RuntimeError as again:
                if "DataLoader worker" not in str(again):
                    raise
                if isinstance(error, (EOFError, ConnectionError)):
                    error = again

    def _discard_if_empty(self) -> None:
        """Remove the folder that this run has made, where it ends before its first epoch or checkpoint."""
        made_here = self.accelerator.is_main_process and self.is_new
        if made_here and not self.history.epochs and not self.checkpoints.all():
            shutil.rmtree(self.folder.path)

    def finish(self) -> Path:
        """Evaluate the test split where there is one, say what came of the run, and push it where that is asked for.

        Returns:
            The run's folder.

        Raises:
            ApartError: where the run is complete, but not pushed.
        """
        if self.is_left:
            result = self.history.latest_evaluation if self.data.test is None else evaluate_test(self)
            self._end(result)
        if self.config.push_to_hub is not None and self.accelerator.is_main_process:
            self._push(self.config.push_to_hub)
        return self.folder.path

    def _end(self, result: Evaluation) -> None:
        if self.data.test is not None:
            self.trackers.tell_test(self.trainer.progress.steps, result)
        self.trackers.end()
        self.accelerator.end_training()
        source = self.accelerator.unwrap_model(self.trainer.model).pretrained_cfg
        ours = "import apart_hf and " if is_registered_here(source["architecture"]) else ""
        _log.info(
            f"done: top-1 {result.top1:.2f} % on {self.data.held_out.name}. Load it with "
            f"{ours}timm.create_model('local-dir:{self.folder.path / 'last'}', pretrained=True)"
        )

    def _push(self, repo_id: str) -> None:
        """Push the run; one that was cut off before this is pushed when it is resumed."""
        try:
            _log.info("pushed: %s", push(self.folder.path, repo_id))
        except ApartError as error:
            raise ApartError(
                f"the run is complete, but not pushed: {error} The command: apart-hf push {self.folder.path} {repo_id}"
            ) from error
