"""A whole run from one `TrainConfig`: data, model, strategy, training, and the folder it leaves."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn

from apart_hf.config.checks import check_names
from apart_hf.config.defaults import fill_defaults, fill_from_data
from apart_hf.config.train_config import TrainConfig
from apart_hf.data import ImageData, Loaders, LoaderSettings, load_image_data
from apart_hf.errors import ApartError
from apart_hf.hub.publish import check_access, push
from apart_hf.models import is_registered_here
from apart_hf.runs.components import data_settings, make_accelerator, make_optimizer, make_scheduler
from apart_hf.runs.failures import explained, is_out_of_memory, out_of_memory
from apart_hf.runs.folder import RunFolder
from apart_hf.runs.interruption import Schedule, StopRequest, noticing_lost_processes
from apart_hf.runs.model import make_model
from apart_hf.runs.record import training_record
from apart_hf.runs.report import describe_data
from apart_hf.strategies.methods import create_strategy
from apart_hf.training.trainer import Trainer
from apart_hf.utils.processes import from_main_process, use_threads


@noticing_lost_processes()
def train(config: TrainConfig) -> Path:
    """Run the training that `config` describes and return the run's folder.

    Raises:
        ApartError: before anything is written, where the settings do not fit each other or the data; later, where
            training cannot go on, see `apart_hf.runs.failures`.
        Interrupted: where it stopped and can be resumed.
    """
    check_names(config)
    config = fill_defaults(config)
    stop = StopRequest()
    try:
        with stop.listening():
            return _train(config, stop)
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(error, config) from error
        raise


def _train(config: TrainConfig, stop: StopRequest) -> Path:
    accelerator = stop.accelerator = make_accelerator(config)
    if config.push_to_hub is not None:
        from_main_process(accelerator, lambda: bool(check_access(config.push_to_hub)))
    threads = use_threads(config.threads, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    set_seed(config.seed)

    data = _load(config, accelerator)
    config = fill_from_data(config, data, accelerator, threads)
    model, images = make_model(config, data)
    ema = ModelEmaV3(model, decay=config.model_ema_decay, use_warmup=True) if config.model_ema else None
    config = dataclasses.replace(config, img_size=images["input_size"][-1])
    loaders = Loaders(
        data,
        LoaderSettings(
            images,
            config.batch_size,
            config.validation_batch_size or config.batch_size,
            config.loader,
            config.workers,
            config.seed,
            {
                "aa": config.aa,
                "color_jitter": config.color_jitter,
                "reprob": config.reprob,
                "interpolation": "random" if config.interpolation == "random" else None,
            },
            skip_bad=config.on_bad_image == "skip",
            shuffle_buffer=config.shuffle_buffer,
            padding=config.padding,
        ),
        accelerator,
    )
    train_loader, val_loader = loaders.train(), loaders.evaluation(data.val)
    model, optimizer = accelerator.prepare(model, make_optimizer(config, model))
    if ema is not None:
        ema.module.to(accelerator.device)
    scheduler = make_scheduler(config, optimizer, math.ceil(len(train_loader) / config.grad_accum_steps))
    strategy = create_strategy(
        config.method,
        model,
        accelerator=accelerator,
        **config.hyper_parameters(),
        generator=torch.Generator().manual_seed(config.seed + accelerator.process_index),
    )
    strategy.second_pass_size(config.batch_size)  # raises where the batch does not fit the method
    passes = strategy.method.passes(strategy.ratio, config.every)
    source = accelerator.unwrap_model(model).pretrained_cfg
    record = training_record(
        config, data, strategy.hyper, passes=passes, processes=accelerator.num_processes, source=source
    )
    run = RunFolder(config, images, data, strategy.hyper, record, accelerator)
    set_seed(config.seed, device_specific=True)  # ranks augment, mix and drop out differently

    say = accelerator.print
    for line in describe_data(config, data, images["input_size"], loaders.kind):
        say(line)
    say(
        f"model: {config.model}, {sum(p.numel() for p in model.parameters()):,} parameters; strategy: {strategy}, "
        f"{passes:g} passes a step"
    )
    say(
        f"run: {config.epochs} epochs of {len(train_loader)} steps, {accelerator.num_processes} process(es) on "
        f"{accelerator.device.type}, {threads} thread(s) each -> {run.folder}"
    )

    mixes = config.mixup > 0 or config.cutmix > 0
    trainer = Trainer(
        accelerator,
        model,
        strategy,
        optimizer,
        scheduler,
        criterion=nn.CrossEntropyLoss(label_smoothing=0.0 if mixes else config.smoothing),
        train_loader=train_loader,
        val_loader=val_loader,
        clip_grad=config.clip_grad,
        log_interval=config.log_interval,
        mixup=Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=len(data.class_names))
        if mixes
        else None,
        every=config.every,
        ema=ema,
        skip_bad=config.on_bad_image == "skip",
        val_interval=config.val_interval,
        skip_nonfinite=config.on_nonfinite == "skip",
    )
    if not run.restore(trainer):
        say(f"{run.folder} is finished: {trainer.epoch} epochs, {trainer.steps} steps.")
        _push(config, run.folder, accelerator)
        return run.folder
    if run.checkpoint is not None:
        say(f"resumed from {run.checkpoint}: epoch {trainer.epoch + 1}, {trainer.batch} batches in.")
    trainer.after_step = Schedule(config.checkpoint_interval, run, trainer, stop)
    try:
        with stop.noting():
            for metrics in trainer.fit(config.epochs, config.max_steps):
                run.add(metrics, trainer.evaluated, last=trainer.is_done(config.epochs, config.max_steps))
                run.save(trainer)
                trainer.after_step.check()
    except Exception as error:
        told = _told(error, config, run, trainer)
        if told is error:
            raise
        raise told from error
    result = run.history[-1] if data.test is None else run.test(trainer, loaders.evaluation(data.test))
    accelerator.end_training()
    ours = "import apart_hf and " if is_registered_here(source["architecture"]) else ""
    say(
        f"done: top-1 {result['top1']:.2f} % on {data.held_out.name}. Load it with "
        f"{ours}timm.create_model('local-dir:{run.folder / 'last'}', pretrained=True)"
    )
    _push(config, run.folder, accelerator)
    return run.folder


def _told(error: Exception, config: TrainConfig, run: RunFolder, trainer: Trainer) -> Exception:
    """See `explained`. torch's watch over loader processes may interrupt that, too."""
    while True:
        try:
            run.discard_if_empty()
            return explained(error, config, run, trainer)
        except RuntimeError as again:
            if "DataLoader worker" not in str(again):
                raise


def _load(config: TrainConfig, accelerator: Accelerator) -> ImageData:
    """The data, of which one process fills the cache; where it cannot, all say why."""
    loaded = []
    from_main_process(accelerator, lambda: loaded.append(load_image_data(data_settings(config))))
    return loaded[0] if loaded else load_image_data(data_settings(config))


def _push(config: TrainConfig, folder: Path, accelerator: Accelerator) -> None:
    """Where that is asked for; a run that was cut off before is pushed when it is resumed."""
    if config.push_to_hub is None or not accelerator.is_main_process:
        return
    try:
        print(f"pushed: {push(folder, config.push_to_hub)}")
    except ApartError as error:
        raise ApartError(
            f"the run is complete, but not pushed: {error} The command: python scripts/push_to_hub.py {folder} "
            f"{config.push_to_hub}"
        ) from error
