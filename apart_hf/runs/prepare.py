"""The first act of a run: from its settings to all that training needs, before anything is trained."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch import nn

from apart_hf.config.defaults import fill_from_data, learning_rate
from apart_hf.config.passes import mean_passes
from apart_hf.config.train_config import FilledConfig, TrainConfig
from apart_hf.data import ImageData, Loaders, load_image_data
from apart_hf.data.fingerprint import data_digest
from apart_hf.hub.publish import check_access
from apart_hf.runs.accelerator import make_accelerator
from apart_hf.runs.checkpoints import Checkpoints
from apart_hf.runs.components import data_settings, loader_settings, make_hyper_schedule, make_optimizer, make_scheduler
from apart_hf.runs.folder import RunFolder
from apart_hf.runs.interruption import StopRequest
from apart_hf.runs.location import make_folder
from apart_hf.runs.model import make_model
from apart_hf.runs.objective import make_criterion, make_mixup
from apart_hf.runs.record import training_record
from apart_hf.runs.recorded_classes import order_of_an_old_run, recorded_order
from apart_hf.runs.report import describe_data
from apart_hf.runs.resume import go_on, lock
from apart_hf.runs.run import Run
from apart_hf.strategies.create import create_strategy
from apart_hf.strategies.hyper_parameters import MethodName
from apart_hf.training.trainer import Trainer
from apart_hf.utils.files import writing
from apart_hf.utils.processes import from_main_process, use_threads

_log = logging.getLogger(__name__)


def prepare(filled: FilledConfig, stop: StopRequest) -> Run:
    """Make a run, or bring one to where its checkpoint is.

    Args:
        filled: its names are checked and its defaults filled in.
        stop: of the run; it is told the accelerator.

    Raises:
        ApartError: where the settings do not fit the data, the model or the machine (then nothing was written), or the
            folder cannot be used.
    """
    accelerator = stop.accelerator = make_accelerator(filled)
    repository = filled.push_to_hub
    if repository is not None:
        from_main_process(accelerator, lambda: bool(check_access(repository)))
    threads = use_threads(filled.threads, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    set_seed(filled.seed)
    data = _load(filled, accelerator)
    model, images = make_model(filled, data)
    loaders = Loaders(data, loader_settings(filled, images), accelerator)
    trainer = _make_trainer(filled, data, loaders, model, images, accelerator)
    path, is_new = from_main_process(accelerator, lambda: make_folder(filled))
    config = fill_from_data(
        filled, data, accelerator, threads=threads, img_size=images["input_size"][-1], experiment=path.name
    )
    strategy = trainer.strategy
    source = accelerator.unwrap_model(trainer.model).pretrained_cfg
    passes = mean_passes(config, math.ceil(len(trainer.train_loader) / config.grad_accum_steps))
    record = training_record(
        config, data, strategy.hyper, passes=passes, processes=accelerator.num_processes, source=source
    )
    folder = RunFolder(path, config, images, data.class_names, record, data.val)
    checkpoints = Checkpoints(path / "checkpoints", accelerator, keep=config.checkpoint_hist)
    checkpoint, problems = from_main_process(accelerator, lambda: _open(folder, checkpoints))
    for problem in problems:
        _log.info("checkpoint %s", problem)
    set_seed(config.seed, device_specific=True)  # ranks augment, mix and drop out differently
    for line in describe_data(config, data, images["input_size"], loaders.kind):
        _log.info(line)
    begins = "" if config.perturb_from_epoch == 1 else f" on average, plain before epoch {config.perturb_from_epoch}"
    _log.info(
        f"model: {config.model}, {sum(p.numel() for p in trainer.model.parameters()):,} parameters; strategy: "
        f"{strategy}, {passes:g} passes a step{begins}"
    )
    _log.info(
        f"run: {config.run_epochs} epochs of {len(trainer.train_loader)} steps, {accelerator.num_processes} "
        f"process(es) on {accelerator.device.type}, {threads} thread(s) each -> {path}"
    )
    run = Run(
        config, accelerator, data, loaders, trainer, folder, is_new, checkpoints, checkpoint, data_digest(data), stop
    )
    run.is_left = go_on(run)
    return run


def _load(config: TrainConfig, accelerator: Accelerator) -> ImageData:
    """Load the data, of which one process fills the cache; where it cannot, all say why."""
    loaded: list[ImageData] = []
    from_main_process(accelerator, lambda: loaded.append(_load_here(config)))
    return loaded[0] if loaded else _load_here(config)


def _load_here(config: TrainConfig) -> ImageData:
    """Load the data with the classes in the order that is recorded, where one is."""
    settings = data_settings(config)
    order = recorded_order(config)
    data = load_image_data(settings if order is None else dataclasses.replace(settings, class_order=tuple(order)))
    order = order_of_an_old_run(config, data)
    return data if order is None else load_image_data(dataclasses.replace(settings, class_order=tuple(order)))


def _make_trainer(
    config: FilledConfig,
    data: ImageData,
    loaders: Loaders,
    model: nn.Module,
    images: dict[str, Any],
    accelerator: Accelerator,
) -> Trainer:
    ema = ModelEmaV3(model, decay=config.model_ema_decay, use_warmup=True) if config.model_ema else None
    train_loader, val_loader = loaders.train(), loaders.evaluation(data.val)
    lr = learning_rate(config, accelerator.num_processes)
    optimizer = make_optimizer(config, model, lr)
    model, optimizer = accelerator.prepare(model, optimizer)
    if ema is not None:
        ema.module.to(accelerator.device)
    steps_per_epoch = math.ceil(len(train_loader) / config.grad_accum_steps)
    generator = torch.Generator(accelerator.device).manual_seed(config.seed + accelerator.process_index)
    strategy = create_strategy(
        cast(MethodName, config.method),  # `check_names` knows it
        model,
        accelerator=accelerator,
        generator=generator,
        every=config.every,
        mean=images["mean"],
        std=images["std"],
        **config.hyper_parameters(),
    )
    if held := list(strategy.parameters()):
        optimizer.add_param_group({"params": held})  # before the scheduler, which takes note of each group
    scheduler = make_scheduler(config, optimizer, steps_per_epoch)
    strategy.second_pass_size(config.batch_size)  # raises where the batch does not fit the method
    mixup = make_mixup(config, len(data.class_names))
    return Trainer(
        accelerator,
        model,
        strategy,
        optimizer,
        scheduler,
        criterion=make_criterion(config, mixup),
        train_loader=train_loader,
        val_loader=val_loader,
        mixup=mixup,
        clip_grad=config.clip_grad,
        clip_mode=config.clip_mode,
        dist_bn=config.dist_bn,
        hyper_schedule=make_hyper_schedule(config, strategy.hyper, steps_per_epoch, optimizer, lr),
        perturb_from_epoch=config.perturb_from_epoch,
        ema=ema,
        log_interval=config.log_interval,
        skip_bad=config.on_bad_image == "skip",
        skip_nonfinite=config.on_nonfinite == "skip",
        cuda_graph=config.cuda_graph,
        val_interval=config.val_interval,
    )


def _open(folder: RunFolder, checkpoints: Checkpoints) -> tuple[Path | None, list[str]]:
    """Lock the folder and look what is there. Returns what `Checkpoints.newest` does."""
    with writing(folder.path):
        folder.lock = lock(folder.path)
        checkpoints.recover()
        checkpoint, problems = checkpoints.newest()
    if checkpoint is None:
        folder.begin()
    return checkpoint, problems
