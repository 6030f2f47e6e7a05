"""What settings may not be beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apart_hf.config.key_values import check_key_values, key_values
from apart_hf.errors import ApartError

if TYPE_CHECKING:
    from apart_hf.config.train_config import TrainConfig

# arguments of timm's factories that have a setting of their own
_OF_MODEL = {
    "drop_rate": "drop",
    "drop_path_rate": "drop_path",
    "global_pool": "gp",
    "bn_momentum": "bn_momentum",
    "bn_eps": "bn_eps",
}
_OF_OPTIMIZER = {
    "lr": "lr",
    "weight_decay": "weight_decay",
    "momentum": "momentum",
    "eps": "opt_eps",
    "betas": "opt_betas",
    "layer_decay": "layer_decay",
}
_DECIDED_OF_MODEL = {
    "model_name": "use --model",
    "name": "use --model",
    "num_classes": "the data say how many there are",
    "pretrained": "use --pretrained",
    "checkpoint_path": "use --initial-checkpoint",
    "weights": "use --pretrained-path",
    "pretrained_path": "use --pretrained-path",
}
_DECIDED_OF_OPTIMIZER = {
    "opt": "use --opt",
    "params": "all that is trained in the model is optimised",
    "model_or_params": "all that is trained in the model is optimised",
    "param_group_fn": "all that is trained in the model is optimised",
    "filter_bias_and_bn": "--weight-decay is on all parameters",
    "weight_decay_exclude_1d": "--weight-decay is on all parameters",
    "fallback_list": "--weight-decay is on all parameters",
    "fallback_no_weight_decay": "--weight-decay is on all parameters",
}


def check_together(config: TrainConfig) -> None:
    """Raise ApartError for the first settings that contradict each other."""
    _check_optimisation(config)
    _check_images(config)
    _check_model(config)
    if config.wandb_project is not None and config.project not in ("apart_hf", config.wandb_project):
        raise ApartError(
            f"--project {config.project} and --wandb-project {config.wandb_project} are the same; leave one out."
        )


def check_in_use(config: TrainConfig) -> None:
    """Raise ApartError for the first setting of something that is off, so that it would do nothing in a run."""
    if config.clip_grad is None and config.clip_mode != "norm":
        raise ApartError(f"--clip-mode {config.clip_mode} clips nothing without --clip-grad; add it, or leave it out.")
    for flag, value in (("--wandb-project", config.wandb_project), ("--wandb-tags", config.wandb_tags)):
        if value is not None and not {"wandb", "all"} & set(config.trackers or ()):
            raise ApartError(f"{flag} is of a tracker that is off; add --log-wandb, or leave it out.")


def _check_optimisation(config: TrainConfig) -> None:
    if config.clip_grad == 0:
        raise ApartError("--clip-grad 0 would remove every gradient; leave the flag out to clip nothing.")
    if config.layer_decay is not None and config.sched == "none":
        raise ApartError(
            "--layer-decay scales what a schedule sets, and --sched none sets nothing; take --sched constant."
        )
    noise = config.lr_noise or []
    if len(noise) > 2 or noise != sorted(set(noise)):
        raise ApartError(
            f"--lr-noise {' '.join(map(str, noise))}: needs one share of the training, or two, the smaller one first."
        )
    check_key_values("--opt-kwargs", config.opt_kwargs, "amsgrad=True")
    for key in key_values(config.opt_kwargs):
        if key in _OF_OPTIMIZER:
            raise ApartError(
                f"--opt-kwargs {key}= has a flag of its own; use --{_OF_OPTIMIZER[key].replace('_', '-')}."
            )
        if key in _DECIDED_OF_OPTIMIZER:
            raise ApartError(f"--opt-kwargs {key}= is decided already; {_DECIDED_OF_OPTIMIZER[key]}.")


def _check_images(config: TrainConfig) -> None:
    if config.train_num_samples is not None and not config.streaming:
        raise ApartError("--train-num-samples is the length of a stream; add --streaming, or leave it out.")
    if config.val_fraction is not None and config.streaming:
        raise ApartError("--val-fraction needs the whole training split, which a stream is not; drop one flag.")
    if config.aa is not None and config.color_jitter:
        raise ApartError("--aa and --color-jitter exclude each other in timm; leave one of them out.")
    if (config.mixup or config.cutmix) and (config.batch_size or 2) % 2:
        raise ApartError(f"mixup and cutmix mix pairs; --batch-size {config.batch_size} is odd, take an even one.")
    if config.scale is not None and config.scale[0] > config.scale[1]:
        raise ApartError(f"--scale {config.scale[0]} {config.scale[1]}: the smaller share comes first.")
    if config.scale is not None and config.padding is not None:
        raise ApartError(
            "--scale is of timm's random crop, and --padding of another one, of small images; leave one of them out."
        )
    if 0 < config.aug_repeats < 1:
        raise ApartError(f"--aug-repeats {config.aug_repeats}: each image comes at least once; take 1 or more, or 0.")
    if config.aug_repeats and config.streaming:
        raise ApartError("--aug-repeats draws from the whole training split, which a stream is not; drop one flag.")


def _check_model(config: TrainConfig) -> None:
    for key in key_values(config.model_kwargs):
        if key in _DECIDED_OF_MODEL:
            raise ApartError(f"--model-kwargs {key}= is decided already; {_DECIDED_OF_MODEL[key]}.")
        if getattr(config, _OF_MODEL.get(key, ""), None):
            flag = f"--{_OF_MODEL[key].replace('_', '-')}"
            raise ApartError(f"{flag} and --model-kwargs {key}= are the same; leave one of them out.")
    if config.gp == "":
        raise ApartError("--gp '': names no pooling; leave the flag out for the model's own.")
    if config.pretrained_path is not None and config.initial_checkpoint is not None:
        raise ApartError(
            "--pretrained-path and --initial-checkpoint both say which weights to start from; leave one of them out."
        )
