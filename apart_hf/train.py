"""A whole run from one `TrainConfig`: data, model, strategy, training, and the folder it leaves."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, LoggerType, set_seed
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.models import is_model, split_model_name_tag
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

from apart_hf.config import HYPER_PARAMETERS, TrainConfig, parse_arguments
from apart_hf.config_file import write_config
from apart_hf.data import (
    DATASETS,
    ImageData,
    LoaderSettings,
    data_config,
    find_dataset,
    load_image_data,
    make_loaders,
)
from apart_hf.errors import ApartError, unknown_name
from apart_hf.models import is_registered_here
from apart_hf.recipes import budgeted
from apart_hf.run_folder import RunFolder
from apart_hf.runtime import cores, use_threads
from apart_hf.strategies import METHODS, check_hyper_parameters, create_strategy
from apart_hf.trainer import Trainer


def main(arguments: list[str] | None = None) -> None:
    """The command line: bad input ends in one line on stderr and exit code 2."""
    prog = Path(sys.argv[0]).name
    try:
        config = parse_arguments(arguments, prog=prog)
        if config.print_config:
            check_names(config)
            print(write_config(dataclasses.asdict(settle(config))), end="")
        else:
            train(config)
    except ApartError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)


def train(config: TrainConfig) -> Path:
    """Run the training that `config` describes and return the run's folder.

    Raises: ApartError, before anything is written, where the settings do not fit each other or the data.
    """
    check_names(config)
    config = settle(config)
    accelerator = make_accelerator(config)
    threads = use_threads(config.threads, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    set_seed(config.seed)

    with accelerator.main_process_first():  # one process fills the cache
        data = load_image_data(
            config.dataset, config.data_dir, train_split=config.train_split, val_split=config.val_split,
            input_key=config.input_key, target_key=config.target_key, num_classes=config.num_classes,
        )
    config = resolve(config, data, accelerator, threads)
    model, images = make_model(config, data)
    ema = ModelEmaV3(model, decay=config.model_ema_decay, use_warmup=True) if config.model_ema else None
    config = dataclasses.replace(config, img_size=images["input_size"][-1])
    check_size(config, data, accelerator)
    augmentation = {"aa": config.aa, "color_jitter": config.color_jitter, "reprob": config.reprob}
    train_loader, val_loader, loader = make_loaders(data, LoaderSettings(
        images, config.batch_size, config.validation_batch_size or config.batch_size, config.loader, config.workers,
        config.seed, accelerator.device, augmentation,
    ))
    config = dataclasses.replace(config, loader=loader)
    # weight decay on every parameter, BN and biases included, as in the paper
    try:
        optimizer = create_optimizer_v2(
            model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum,
            filter_bias_and_bn=False,
        )
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ApartError(f"cannot create optimizer {config.opt!r}: {_first_line(error)}.") from error
    model, optimizer, train_loader, val_loader = accelerator.prepare(model, optimizer, train_loader, val_loader)
    if ema is not None:
        ema.module.to(accelerator.device)
    scheduler = make_scheduler(config, optimizer, math.ceil(len(train_loader) / config.grad_accum_steps))
    strategy = create_strategy(
        config.method, model, accelerator=accelerator, **config.hyper_parameters(),
        generator=torch.Generator().manual_seed(config.seed + accelerator.process_index),
    )
    strategy.second_pass_size(config.batch_size)  # raises where the batch does not fit the method
    run = RunFolder(config, images, data, strategy.hyper, accelerator)
    set_seed(config.seed, device_specific=True)  # ranks augment, mix and drop out differently

    say = accelerator.print
    if config.dataset == "demo" and config.data_dir is None:
        say("data: the bundled demo set, 7,000 images of Fashion-MNIST. For real data: --dataset cifar100 "
            f"(or {', '.join(name for name in DATASETS if name not in ('demo', 'cifar100'))}), or --data-dir FOLDER.")
    say(f"data: {len(data.train):,} training and {len(data.val):,} evaluation images, {len(data.class_names)} classes, "
        f"input {'x'.join(map(str, images['input_size']))}, loader: {config.loader}")
    say(f"model: {config.model}, {sum(p.numel() for p in model.parameters()):,} parameters; strategy: {strategy}, "
        f"{strategy.method.passes(strategy.ratio, config.every):g} passes a step")
    say(f"run: {config.epochs} epochs of {len(train_loader)} steps, {accelerator.num_processes} process(es) on "
        f"{accelerator.device.type}, {threads} thread(s) each -> {run.folder}")

    mixes = config.mixup > 0 or config.cutmix > 0
    trainer = Trainer(
        accelerator, model, strategy, optimizer, scheduler,
        criterion=nn.CrossEntropyLoss(label_smoothing=0.0 if mixes else config.smoothing),
        train_loader=train_loader, val_loader=val_loader, clip_grad=config.clip_grad, log_interval=config.log_interval,
        mixup=Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=len(data.class_names))
        if mixes else None,
        every=config.every, ema=ema,
    )
    try:
        for metrics in trainer.fit(config.epochs, config.max_steps):
            run.add(metrics, trainer.evaluated)
    except Exception as error:
        run.discard_if_empty()
        if "Expected more than 1 value per channel" in str(error):  # torch's, in a plain pass
            raise ApartError(f"a BatchNorm layer has one value per channel in a batch ({_first_line(error)}); use a "
                             "larger --batch-size or --img-size.") from error
        raise
    accelerator.end_training()
    ours = "import apart_hf and " if is_registered_here(accelerator.unwrap_model(model)) else ""
    say(f"done: top-1 {run.history[-1]['top1']:.2f} % on {data.spec.val_split}. Load it with "
        f"{ours}timm.create_model('local-dir:{run.folder / 'last'}', pretrained=True)")
    return run.folder


def check_names(config: TrainConfig) -> None:
    """What can be refused before any library is asked."""
    if config.method not in METHODS:
        raise unknown_name("method", config.method, METHODS)
    find_dataset(config.dataset, config.data_dir)
    if ":" not in config.model and not is_model(split_model_name_tag(config.model)[0]):
        raise unknown_name("model", config.model, timm.list_models())
    if config.opt not in list_optimizers():
        raise unknown_name("optimizer", config.opt, list_optimizers())
    if config.opt == "adahessian":
        raise ApartError("--opt adahessian needs second derivatives, which the two passes do not give; choose another.")
    check_hyper_parameters(config.method, config.hyper_parameters())
    for tracker in config.report_to or ():
        if tracker not in [known.value for known in LoggerType]:
            raise unknown_name("tracker", tracker, [known.value for known in LoggerType])
        if LoggerType(tracker) not in [*get_available_trackers(), LoggerType.ALL]:
            raise ApartError(f"--report-to {tracker}: not installed; pip install {tracker}, or drop the flag.")


def make_accelerator(config: TrainConfig) -> Accelerator:
    precision = {None: None, "float32": "no", "bfloat16": "bf16", "float16": "fp16"}[config.amp_dtype]
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP"),
                           ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise ApartError(
                f"{name} shards weights or gradients, which the second pass needs whole on each process; launch with "
                "plain data parallelism (accelerate launch --multi_gpu)."
            )
    accelerator = Accelerator(
        mixed_precision=precision, log_with=config.report_to, project_dir=config.output,
        gradient_accumulation_steps=config.grad_accum_steps,
        dynamo_backend="inductor" if config.torchcompile else None,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ApartError("float16 needs a GPU (accelerate scales no gradients on the CPU); use --amp-dtype bfloat16.")
    if config.expect_processes not in (None, accelerator.num_processes):
        raise ApartError(
            f"{accelerator.num_processes} process(es) were started, not {config.expect_processes}; accelerate launch "
            "--cpu starts one: use torchrun, or ACCELERATE_USE_CPU=true accelerate launch --multi_gpu."
        )
    if config.sync_bn and accelerator.device.type == "cpu":
        raise ApartError("--sync-bn needs GPUs: torch has no synchronised BatchNorm for the CPU; leave the flag out.")
    return accelerator


def settle(config: TrainConfig) -> TrainConfig:
    """The config with every None that depends on other settings decided; touches no data."""
    usual = {"epochs": 200, "batch_size": 128, "lr": 0.1, "sched": "multistep", "weight_decay": 5e-4}
    if config.data_dir is None or config.dataset != TrainConfig.dataset:
        usual |= find_dataset(config.dataset, config.data_dir).defaults
    method = METHODS[config.method]
    known = method.hyper_parameters()
    lacking = set(HYPER_PARAMETERS) - known.keys()
    if config.batch_size is not None:
        lacking.add("groups")  # it belongs to the usual batch size
    usual = known | {key: value for key, value in usual.items() if key not in lacking}
    config = dataclasses.replace(config, **{k: v for k, v in usual.items() if getattr(config, k) is None})
    epochs, milestones = config.epochs, config.decay_milestones
    if config.budget is not None:
        passes = method.passes(config.ratio or 1.0, config.every)
        epochs, milestones = budgeted(epochs, milestones, config.budget, passes)
    if config.sched == "multistep" and any(m > epochs for m in milestones or ()):
        raise ApartError(
            f"--decay-milestones {' '.join(map(str, milestones))} lie beyond --epochs {epochs}, and the learning "
            "rate would not fall; name earlier ones, or shorten a recipe by --budget."
        )
    if config.warmup_epochs >= epochs:
        raise ApartError(f"--warmup-epochs {config.warmup_epochs} leaves nothing of --epochs {epochs}; shorten it.")
    return dataclasses.replace(
        config, epochs=epochs, budget=None,
        decay_milestones=sorted(milestones or {max(1, epochs // 2), max(1, epochs * 3 // 4)}),
        workers=config.workers if config.workers is not None else (min(8, cores()) if torch.cuda.is_available() else 0),
    )


def resolve(config: TrainConfig, data: ImageData, accelerator: Accelerator, threads: int) -> TrainConfig:
    """The config with every None that depends on the data or the machine decided."""
    return dataclasses.replace(
        config,
        amp_dtype={"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[accelerator.mixed_precision],
        threads=threads,
        **{key: getattr(data.spec, key) for key in ("train_split", "val_split", "input_key", "target_key")},
        num_classes=len(data.class_names),
    )


def make_model(config: TrainConfig, data: ImageData) -> tuple[nn.Module, dict[str, Any]]:
    """The timm model for the data's classes, and timm's description of its evaluation images."""
    kwargs = {"drop_rate": config.drop, "drop_path_rate": config.drop_path, "pretrained": config.pretrained}
    kwargs = {key: value for key, value in kwargs.items() if value}
    try:
        source = timm.get_pretrained_cfg(config.model)
        if source is not None and source.fixed_input_size and config.img_size is not None:
            kwargs["img_size"] = config.img_size
        model = timm.create_model(config.model, num_classes=len(data.class_names), **kwargs)
        if config.grad_checkpointing:
            model.set_grad_checkpointing()
    except (RuntimeError, ValueError, OSError, TypeError, AssertionError, AttributeError) as error:
        raise ApartError(f"cannot create model {config.model!r}: {_first_line(error)}") from error
    size = data_config(
        model.pretrained_cfg, data.image_size, img_size=config.img_size, mean=data.spec.mean, std=data.spec.std
    )
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *size["input_size"]))
    except (RuntimeError, ValueError, AssertionError) as error:
        edge, usual = size["input_size"][-1], model.pretrained_cfg["input_size"][-1]
        raise ApartError(
            f"model {config.model!r} does not take images of {edge} pixels ({_first_line(error)}); "
            f"try --img-size {usual}, the model's own."
        ) from error
    if config.sync_bn:
        model = convert_sync_batchnorm(model)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model, size


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def make_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int):
    """timm's scheduler, stepped by update. Milestones are epochs *after* which the learning rate falls."""
    half_a_step = 0.5 / steps_per_epoch  # timm decays one step before its milestone
    scheduler, _ = create_scheduler_v2(
        optimizer, config.sched, num_epochs=config.epochs, warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr, min_lr=config.min_lr,
        decay_milestones=[m + half_a_step for m in config.decay_milestones],
        step_on_epochs=False, updates_per_epoch=steps_per_epoch,
    )
    return scheduler


def check_size(config: TrainConfig, data: ImageData, accelerator: Accelerator) -> None:
    """Raise ApartError where the training split is smaller than one step."""
    needed = config.batch_size * accelerator.num_processes
    if len(data.train) < needed:
        raise ApartError(
            f"split {config.train_split!r} has {len(data.train)} images, fewer than one step of {needed} "
            f"(--batch-size {config.batch_size} x {accelerator.num_processes} process(es)); use a smaller batch."
        )


if __name__ == "__main__":
    main()
