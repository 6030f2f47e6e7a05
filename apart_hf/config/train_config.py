"""Every setting of a run: one dataclass, from which the command line and the configuration file are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apart_hf.config.checks import check_values
from apart_hf.config.recipes import RECIPES
from apart_hf.data import DATASETS, LOADERS, ON_BAD_IMAGE
from apart_hf.errors import ApartError
from apart_hf.strategies.methods import METHODS


def _option(default: Any, group: str, help: str, **argparse_arguments: Any) -> Any:
    return field(default=default, metadata={"group": group, "help": help, "arguments": argparse_arguments})


def _int(default, group, help, **more):
    return _option(default, group, help, type=int, metavar="N", **more)


def _float(default, group, help, **more):
    return _option(default, group, help, type=float, metavar="X", **more)


def _flag(group, help):
    return _option(False, group, help)


def _text(default, group, help, **more):
    return _option(default, group, help, type=str, **more)


ON_NONFINITE = ("stop", "skip")
EVAL_METRICS = ("top1", "top5", "eval_loss")
HYPER_PARAMETERS = sorted({key for method in METHODS.values() for key in method.hyper_parameters()})
_METHODS = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())


@dataclass
class TrainConfig:
    """Settings of one training run. None stands for "decided from the others", as the help texts say."""

    config: str | None = _text(None, "settings", "YAML file of settings, as runs write them; flags win", metavar="FILE")
    recipe: str | None = _text(
        None, "settings", f"a setting of the paper, {', '.join(sorted(RECIPES)[:2])}, ...; flags win", metavar="NAME"
    )
    print_config: bool = _flag("settings", "print the resolved settings as YAML and exit; touches no data")

    model: str = _text("resnet18", "model", "any timm model, or wide_resnet40_2, preact_resnet18, ...", metavar="NAME")
    model_kwargs: list[str] | None = _text(
        None,
        "model",
        "further arguments of its constructor, for instance drop_block_rate=0.1",
        nargs="+",
        metavar="KEY=VALUE",
    )
    pretrained: bool = _flag("model", "start from timm's weights for it")
    initial_checkpoint: str | None = _text(
        None,
        "model",
        "start from the weights in this file (safetensors, or a state_dict that torch reads without "
        "pickled code); a classifier of another size is left out",
        metavar="FILE",
    )
    channels_last: bool = _flag("model", "keep activations in channels_last memory format")
    drop: float = _float(0.0, "model", "dropout, where the model has it; drawn anew in the second pass")
    drop_path: float = _float(0.0, "model", "stochastic depth; drawn anew in the second pass")
    grad_checkpointing: bool = _flag("model", "recompute activations in the backward, to save memory")
    torchcompile: bool = _flag("model", "compile the model by torch.compile")
    sync_bn: bool = _flag("model", "synchronise BatchNorm over processes (GPUs only)")
    model_ema: bool = _flag("model", "keep an exponential average of the weights; it is evaluated and exported")
    model_ema_decay: float = _float(0.9998, "model", "of a step, with --model-ema")

    method: str = _text("apart", "method", _METHODS, metavar="NAME")
    epsilon: float | None = _float(None, "method", "radius of delta, a share of batch mean and scale [0.1; demo: 0.05]")
    groups: int | None = _int(
        None, "method", "groups of samples with statistics of their own [16; demo, where --batch-size is not given: 8]"
    )
    ratio: float | None = _float(None, "method", "share of the batch in the second pass, in (0, 1] [apart: 1]")
    rho: float | None = _float(
        None, "method", "radius of SAM's step in the weights [sam: 0.05; apart-sam: 0.2; asam, apart-asam, sam-on: 0.5]"
    )
    eta: float | None = _float(None, "method", "asam: added to the weights' sizes [0.01]")
    every: int = _int(1, "method", "second pass in every N-th step only; the others are plain steps")
    local_attack: bool = _flag("method", "each process attacks by its own batch, rather than all by the joint one")
    global_norm: bool = _flag("method", "sam: all processes climb the mean gradient (one more all-reduce)")

    dataset: str = _text(
        "demo",
        "data",
        f"{', '.join(DATASETS)}, or a Hub id user/name; demo is a small part of Fashion-MNIST",
        metavar="NAME",
    )
    dataset_config: str | None = _text(None, "data", "configuration of a Hub dataset [its only one]", metavar="NAME")
    data_dir: str | None = _text(
        None, "data", "local folder instead: parquet files, a folder of images a class, or save_to_disk", metavar="DIR"
    )
    train_split: str | None = _text(None, "data", "split to train on [found]", metavar="NAME")
    val_split: str | None = _text(None, "data", "split to evaluate on [found]", metavar="NAME")
    val_fraction: float | None = _float(
        None,
        "data",
        "keep this share of each class of the training split for the evaluation after every epoch; "
        "--val-split is looked at once, at the end [off]",
    )
    streaming: bool = _flag("data", "read images as they come, without a copy on disk")
    shuffle_buffer: int = _int(2048, "data", "images that a loader process shuffles, with --streaming")
    train_num_samples: int | None = _int(None, "data", "images in the training split, with --streaming [found]")
    on_bad_image: str = _text(
        "error",
        "data",
        "what to do with an image that cannot be decoded; skip: train on another one, evaluate "
        "without it, and count it",
        choices=ON_BAD_IMAGE,
    )
    input_key: str | None = _text(None, "data", "column of the images [found]", metavar="NAME")
    target_key: str | None = _text(None, "data", "column of the class indices [found]", metavar="NAME")
    num_classes: int | None = _int(None, "data", "checked against the data [found]")
    class_map: str | None = _text(
        None, "data", "file of class names, one a line, in the order of their indices [the data's]", metavar="FILE"
    )
    img_size: int | None = _int(None, "data", "input edge in pixels [small images: their own; else: the model's]")
    input_size: list[int] | None = _option(
        None, "data", "the same as timm writes it: 3 224 224", type=int, nargs=3, metavar="N"
    )
    loader: str = _text(
        "auto",
        "data",
        "memory: small images are decoded once and augmented by the batch; workers: one by one, by "
        "loader processes; auto: memory where it gives the same",
        choices=LOADERS,
    )
    workers: int | None = _int(
        None, "data", "loader processes [0 on the CPU; else one a core, at most 8]", flags=("-j",)
    )
    padding: int | None = _int(
        None, "data", "black pixels around a small image before its random crop in training; 0: no crop [4; demo: 0]"
    )
    interpolation: str | None = _text(
        None,
        "data",
        "how images are resized; random: in training, bilinear or bicubic by chance [the model's]",
        choices=("bilinear", "bicubic", "nearest", "random"),
    )
    crop_pct: float | None = _float(None, "data", "share of the resized edge that evaluation sees [the model's]")
    mean: list[float] | None = _option(
        None, "data", "of each channel, in [0, 1] [the dataset's or the model's]", type=float, nargs=3, metavar="X"
    )
    std: list[float] | None = _option(None, "data", "likewise", type=float, nargs=3, metavar="X")
    aa: str | None = _text(
        None, "data", "timm's automatic augmentation, for instance rand-m9-mstd0.5 [off]", metavar="POLICY"
    )
    color_jitter: float = _float(0.0, "data", "colour jitter; not with --aa")
    reprob: float = _float(0.0, "data", "probability of random erasing")
    mixup: float = _float(0.0, "data", "mixup alpha; 0: off")
    cutmix: float = _float(0.0, "data", "cutmix alpha; 0: off. With --mixup: one or the other, batch by batch")
    smoothing: float = _float(0.0, "data", "label smoothing in [0, 1)")

    epochs: int | None = _int(None, "optimisation", "length in epochs [200; demo: 6]")
    budget: float | None = _float(
        None,
        "optimisation",
        "cost in units of the given epochs of plain training: epochs and milestones become "
        "budget / passes times theirs (apart, 2 passes: 200 epochs are budget 2)",
    )
    max_steps: int | None = _int(None, "optimisation", "stop after N optimizer steps; still evaluates and exports")
    batch_size: int | None = _int(None, "optimisation", "images a process and step [128; demo: 64]", flags=("-b",))
    validation_batch_size: int | None = _int(
        None, "optimisation", "images a process in evaluation [--batch-size]", flags=("-vb",)
    )
    grad_accum_steps: int = _int(1, "optimisation", "batches whose mean gradient makes one step")
    opt: str = _text("momentum", "optimisation", "timm optimizer; momentum is SGD without Nesterov", metavar="NAME")
    lr: float | None = _float(None, "optimisation", "learning rate [0.1; demo: 0.05]")
    lr_base: float | None = _float(
        None, "optimisation", "learning rate for --lr-base-size images a step; --lr becomes it in proportion"
    )
    lr_base_size: int = _int(256, "optimisation", "images a step that --lr-base is meant for")
    lr_base_scale: str | None = _text(
        None,
        "optimisation",
        "how --lr grows with the batch [sqrt for ada* and lamb optimizers, else linear]",
        choices=("linear", "sqrt"),
    )
    momentum: float = _float(0.9, "optimisation", "SGD momentum")
    weight_decay: float | None = _float(None, "optimisation", "on all parameters [0.0005, the paper's; demo: 0.005]")
    sched: str | None = _text(
        None,
        "optimisation",
        "learning-rate schedule, by step [multistep; demo: cosine]",
        choices=("multistep", "cosine", "none"),
    )
    decay_milestones: list[int] | None = _int(
        None, "optimisation", "epochs after which the learning rate falls to a tenth [1/2 and 3/4 of all]", nargs="+"
    )
    min_lr: float = _float(0.0, "optimisation", "where the cosine ends")
    warmup_lr: float = _float(0.0, "optimisation", "where the warmup starts")
    warmup_epochs: int = _int(0, "optimisation", "epochs of linear warmup")
    clip_grad: float | None = _float(None, "optimisation", "largest norm of the combined gradient [off]")
    on_nonfinite: str = _text(
        "stop",
        "optimisation",
        "what to do about a step whose loss or gradient is not finite; stop: end the run, "
        "saying where it comes from; skip: leave the step out, and count it",
        choices=ON_NONFINITE,
    )

    license: str | None = _text(None, "publishing", "of the exported weights, as the Hub spells it", metavar="NAME")
    push_to_hub: str | None = _text(
        None, "publishing", "push the finished run to this repository of the Hub", metavar="USER/NAME"
    )

    seed: int = _int(0, "run", "of weights, data order, augmentation and the second pass")
    amp: bool = _flag("run", "16-bit forwards: bfloat16, unless --amp-dtype says otherwise")
    amp_dtype: str | None = _text(
        None,
        "run",
        "arithmetic of the forwards [as configured for accelerate: float32]",
        choices=("float32", "bfloat16", "float16"),
    )
    val_interval: int = _int(1, "run", "evaluate and export after every N-th epoch, and after the last one")
    eval_metric: str = _text("top1", "run", "what best/ is chosen by", choices=EVAL_METRICS)
    expect_processes: int | None = _int(None, "run", "fail unless so many processes were started")
    threads: int | None = _int(None, "run", "CPU threads a process [OMP_NUM_THREADS, or all cores]")
    resume: str | None = _text(
        None,
        "run",
        "go on exactly from the last checkpoint: of this folder, or auto: of the last run of this name, "
        "which starts anew where there is none",
        metavar="auto|FOLDER",
    )
    override: bool = _flag("run", "resume although settings have changed")
    checkpoint_every: str | None = _text(
        None,
        "run",
        "write a checkpoint every N steps, or every so many minutes (10m), and after every epoch [epochs]",
        metavar="N|Nm",
    )
    checkpoint_hist: int = _int(2, "run", "how many of the latest checkpoints are kept, beside the best epoch's")
    output: str = _text("output", "run", "folder of all runs", metavar="DIR")
    experiment: str | None = _text(None, "run", "folder of this run in it [DATASET-MODEL-METHOD]", metavar="NAME")
    log_interval: int = _int(50, "run", "steps between lines where there is no terminal for a progress bar")
    log_wandb: bool = _flag("run", "the same as --report-to wandb")
    report_to: list[str] | None = _text(
        None, "run", "trackers of accelerate: tensorboard, wandb, trackio, ... [none]", nargs="+", metavar="NAME"
    )

    def __post_init__(self):
        if self.log_wandb and "wandb" not in (self.report_to or ()):
            self.report_to = [*(self.report_to or ()), "wandb"]
        check_values(self)

    @property
    def checkpoint_interval(self) -> tuple[int | None, float | None]:
        """(steps, seconds) between checkpoints within an epoch; both None: none there.

        Raises: ApartError where `checkpoint_every` is neither.
        """
        text = self.checkpoint_every
        if text is None:
            return None, None
        number = text.removesuffix("m")
        if not number.isascii() or not number.isdigit() or len(number) > 9 or int(number) < 1:
            raise ApartError(f"--checkpoint-every {text!r}: a number of steps, such as 500, or of minutes: 10m.")
        return (int(number), None) if number == text else (None, 60.0 * int(number))

    @property
    def dataset_name(self) -> str:
        """For folder names and records: the dataset's name, or that of its folder without the way to it."""
        return Path(self.data_dir).resolve().name if self.data_dir else self.dataset

    def hyper_parameters(self) -> dict[str, Any]:
        """Those of the method that were given."""
        values = {key: getattr(self, key) for key in HYPER_PARAMETERS}
        return {key: value for key, value in values.items() if value is not None and value is not False}
