"""The two steps that complete a configuration: by its own settings, then by the data and the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from apart_hf.config.model_arguments import channels_of
from apart_hf.config.passes import budgeted, passes_of, plain_epochs_of
from apart_hf.config.train_config import HYPER_PARAMETERS, CompleteConfig, FilledConfig, TrainConfig
from apart_hf.data import find_dataset
from apart_hf.data.dataset_names import without_prefix
from apart_hf.errors import ApartError
from apart_hf.strategies.methods import METHODS
from apart_hf.utils.processes import cores

if TYPE_CHECKING:
    from accelerate import Accelerator

    from apart_hf.data import ImageData

# what --no-aug makes of the settings of training images; mixing is another matter, as in timm
UNAUGMENTED = {
    "aa": None,
    "color_jitter": 0.0,
    "reprob": 0.0,
    "scale": None,
    "hflip": 0.0,
    "vflip": 0.0,
    "padding": 0,
    "train_interpolation": None,
}
PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # what accelerate calls each `amp_dtype`


def fill_defaults(config: TrainConfig) -> FilledConfig:
    """Decide every None that depends on other settings alone; touches no data.

    Raises:
        ApartError: where the length of the training does not fit its schedule.
    """
    settings = vars(config) | {key: value for key, value in _usual(config).items() if getattr(config, key) is None}
    epochs, milestones = settings["epochs"], config.decay_milestones
    interval = config.decay_epochs
    if config.budget is not None:
        passes = passes_of(config.method, settings)
        before = epochs
        epochs, milestones = budgeted(epochs, milestones, config.budget, passes, plain_epochs_of(config))
        if interval is not None and interval >= 1:  # below, it is a share
            interval *= epochs / before
    if settings["sched"] == "multistep" and any(m > epochs for m in milestones or ()):
        raise ApartError(
            f"--decay-milestones {' '.join(map(str, milestones or ()))} lie beyond --epochs {epochs}, and the learning "
            "rate would not fall; name earlier ones, or shorten a recipe by --budget."
        )
    if config.warmup_epochs >= epochs and not config.warmup_prefix:
        raise ApartError(f"--warmup-epochs {config.warmup_epochs} leaves nothing of --epochs {epochs}; shorten it.")
    if config.no_aug:
        settings |= UNAUGMENTED
    if config.img_size is None and config.input_size is not None:
        settings["img_size"] = config.input_size[-1]
    settings["in_chans"] = channels_of(config)
    if config.wandb_project is not None:
        settings["project"] = config.wandb_project
    if config.amp and config.amp_dtype is None:
        settings["amp_dtype"] = "bfloat16"
    if config.workers is None:
        settings["workers"] = min(8, cores()) if torch.cuda.is_available() else 0
    settings["decay_milestones"] = sorted(milestones or {max(1, epochs // 2), max(1, epochs * 3 // 4)})
    settings |= {"epochs": epochs, "budget": None, "decay_epochs": interval, "report_to": config.trackers}
    filled = FilledConfig(**settings | {"dataset": without_prefix(config.dataset)})
    _check_second_passes(filled)
    return filled


def _check_second_passes(config: FilledConfig) -> None:
    """Raise where second passes, or the warmup of epsilon in them, lie beyond the run, whose schedule makes it longer.

    Raises:
        ApartError: also where there is no such schedule.
    """
    epochs, first, warmup = config.run_epochs, config.perturb_from_epoch, config.epsilon_warmup_epochs
    length = f"--epochs {config.epochs}" + (
        "" if epochs == config.epochs else f" ({epochs} with those of the schedule)"
    )
    if first > epochs:
        raise ApartError(
            f"--perturb-from-epoch {first} lies beyond {length}, and no step would be perturbed; take one of 1 to "
            f"{epochs}."
        )
    if warmup > epochs - plain_epochs_of(config):
        begins = "" if first == 1 else f", beginning by --perturb-from-epoch {first}"
        raise ApartError(f"--epsilon-warmup-epochs {warmup} does not end within {length}{begins}; shorten it.")


def plain_epochs(config: TrainConfig) -> int:
    """Return how many epochs there are before a budget is shared over the method's passes."""
    return config.epochs if config.epochs is not None else _usual(config)["epochs"]


def _usual(config: TrainConfig) -> dict[str, Any]:
    """Return what the dataset and the method suggest for the settings that are left open."""
    usual = {"epochs": 200, "batch_size": 128, "lr": 0.1, "sched": "multistep", "weight_decay": 5e-4}
    usual |= find_dataset(config.dataset, config.data_dir).defaults
    known = METHODS[config.method].hyper_parameters()
    lacking = set(HYPER_PARAMETERS) - known.keys()
    if config.batch_size is not None:
        lacking.add("groups")  # it belongs to the usual batch size
    if known.get("epsilon") != METHODS["apart"].hyper_parameters()["epsilon"]:
        lacking.add("epsilon")  # a dataset's is that of BN statistics
    if config.lr_base is not None:
        lacking.add("lr")  # it is known when the processes are
    return known | {key: value for key, value in usual.items() if key not in lacking}


def fill_from_data(
    config: FilledConfig, data: ImageData, accelerator: Accelerator, *, threads: int, img_size: int, experiment: str
) -> CompleteConfig:
    """Decide every None that depends on the data, the model or the machine. The config is then complete.

    Args:
        config: its defaults are filled in.
        data: what is trained on.
        accelerator: of the run's processes.
        threads: of each process.
        img_size: edge in pixels of what the model is given.
        experiment: name of the run's folder.
    """
    found = {key: getattr(data.spec, key) for key in ("train_split", "val_split", "input_key", "target_key")}
    found |= {
        "lr": learning_rate(config, accelerator.num_processes),
        "amp_dtype": {name: dtype for dtype, name in PRECISIONS.items()}[accelerator.mixed_precision],
        "threads": threads,
        "num_classes": len(data.class_names),
        "img_size": img_size,
        "experiment": experiment,
    }
    return CompleteConfig(**vars(config) | found)


def learning_rate(config: FilledConfig, processes: int) -> float:
    """Return `lr`, or what becomes of `lr_base` for the images that all processes take a step."""
    if config.lr is not None:
        return config.lr
    images = config.batch_size * processes * config.grad_accum_steps
    adaptive = any(kind in config.opt.lower() for kind in ("ada", "lamb"))  # timm's rule
    scale = config.lr_base_scale or ("sqrt" if adaptive else "linear")
    return config.lr_base * (images / config.lr_base_size) ** (1.0 if scale == "linear" else 0.5)
