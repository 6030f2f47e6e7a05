"""Settings of the model and of the method that trains it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from apart_hf.config.setting import setting
from apart_hf.strategies.methods import METHODS

_METHODS = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
_model_setting = partial(setting, group="model")


@dataclass(frozen=True)
class ModelGroup:
    """Says which network is trained, and from which weights."""

    model: str = _model_setting(
        "resnet18",
        "any timm model, or wide_resnet40_2, preact_resnet18, ...",
        role="what",
        on_resume="fixed",
        in_tables=False,
        metavar="NAME",
    )
    model_kwargs: list[str] | None = _model_setting(
        None,
        "further arguments of its constructor, for instance drop_block_rate=0.1",
        role="what",
        on_resume="fixed",
        recorded=24,
        in_tables=False,
        metavar="KEY=VALUE",
    )
    # the record names the weights of these three by itself, without their folders
    pretrained: bool = _model_setting(False, "start from timm's weights for it", role="what")
    pretrained_path: str | None = _model_setting(
        None,
        "start from the weights in this file as if timm had them: first layer and classifier are adapted",
        role="what",
        metavar="FILE",
    )
    initial_checkpoint: str | None = _model_setting(
        None,
        "start from the weights in this file (safetensors, or a state_dict that torch reads without "
        "pickled code); a classifier of another size is left out",
        role="what",
        metavar="FILE",
    )
    channels_last: bool = _model_setting(False, "keep activations in channels_last memory format", role="how")
    drop: float = _model_setting(
        0.0,
        "dropout, where the model has it; drawn anew in the second pass",
        role="what",
        least=0,
        below=1,
        over="must be below 1 (0.2 is common)",
        recorded=22,
    )
    drop_path: float = _model_setting(
        0.0,
        "stochastic depth; drawn anew in the second pass",
        role="what",
        least=0,
        below=1,
        over="must be below 1 (0.1 is common)",
        recorded=23,
    )
    gp: str | None = _model_setting(
        None,
        "global pooling before the classifier: avg, max, avgmax, catavgmax, ... [the model's]",
        role="what",
        on_resume="fixed",
        recorded=61,
        in_tables=False,
        metavar="POOL",
    )
    bn_momentum: float | None = _model_setting(
        None,
        "share of a batch in BatchNorm's running statistics [the model's]",
        role="what",
        above=0,
        most=1,
        over="a share of the batch is at most 1 (0.1 is common)",
        recorded=62,
    )
    bn_eps: float | None = _model_setting(
        None,
        "epsilon of BatchNorm, of models that timm builds with any [the model's]",
        role="what",
        on_resume="fixed",
        above=0,
        recorded=63,
    )
    grad_checkpointing: bool = _model_setting(
        False, "recompute activations in the backward, to save memory", role="how"
    )
    torchcompile: bool = _model_setting(False, "compile the model by torch.compile", role="how")
    cuda_graph: bool = _model_setting(
        False,
        "on a GPU, record a step once and launch it as one graph from then on; where that cannot be, a line says why",
        role="how",
    )
    # of no effect on a single process, which published figures are of
    sync_bn: bool = _model_setting(False, "synchronise BatchNorm over processes (GPUs only)", role="how", recorded=27)
    # likewise; and so close to each other that figures do not tell them apart
    dist_bn: Literal["broadcast", "reduce"] = _model_setting(
        "broadcast",
        "which running statistics are evaluated and exported after several processes; broadcast: those of the first; "
        "reduce: their mean",
        role="what",
        recorded=64,
    )
    model_ema: bool = _model_setting(
        False,
        "keep an exponential average of the weights; it is evaluated and exported",
        role="what",
        on_resume="fixed",
        recorded=25,
    )
    model_ema_decay: float = _model_setting(
        0.9998,
        "of a step, with --model-ema",
        role="what",
        least=0,
        below=1,
        over="must be below 1 (0.9998 is common)",
        recorded=26,
    )


_method_setting = partial(setting, group="method", in_tables=False)


@dataclass(frozen=True)
class MethodGroup:
    """Says how p.grad is filled: the method and its hyper-parameters, which a table's rows decide."""

    method: str = _method_setting("apart", _METHODS, role="what", metavar="NAME")
    epsilon: float | None = _method_setting(
        None, "radius of delta, a share of batch mean and scale [0.1; advbn: 1.1; demo: 0.05]", role="what"
    )
    groups: int | None = _method_setting(
        None,
        "groups of samples with statistics of their own [16; demo, where --batch-size is not given: 8]",
        role="what",
    )
    ratio: float | None = _method_setting(
        None,
        "share of the batch in the second pass, in (0, 1] [1; fast-advprop: 0.25]",
        role="what",
        above=0,
        most=1,
        outside="N/M, the share of the batch in the second pass, is in (0, 1]",
    )
    rho: float | None = _method_setting(
        None,
        "radius of SAM's step in the weights [sam: 0.05; gsam: 0.04; apart-sam: 0.2; asam, apart-asam, sam-on: 0.5]",
        role="what",
    )
    eta: float | None = _method_setting(None, "asam, apart-asam: added to the weights' sizes [0.01]", role="what")
    layer: str | None = _method_setting(
        None,
        "advbn: the layer whose features are perturbed, such as layer1 [auto: the end of the first stage]",
        role="what",
        metavar="NAME",
    )
    step_size: float | None = _method_setting(
        None, "advbn: change of delta in each step of the ascent [0.2]", role="what"
    )
    gamma: float | None = _method_setting(
        None, "awp: radius of the step in each weight, a share of its norm [0.005]", role="what"
    )
    alpha: float | None = _method_setting(
        None, "gsam: share of the clean gradient's part that is orthogonal to the perturbed one [0.01]", role="what"
    )
    pixel_epsilon: float | None = _method_setting(
        None,
        "largest change of a pixel, in units of 1/255 [4; fast-advprop: 1]",
        role="what",
        least=0,
        most=255,
        outside="the radius in units of 1/255 is in [0, 255]",
    )
    pixel_step: float | None = _method_setting(
        None,
        "change of a pixel in each step of the ascent, in units of 1/255 [1]",
        role="what",
        least=0,
        most=255,
        outside="the size of a step in units of 1/255 is in [0, 255]",
    )
    steps: int | None = _method_setting(
        None,
        "steps of the ascent; each but the first takes a pass [advprop: 5; advbn: 6; apart-advprop: 1]",
        role="what",
        least=1,
    )
    every: int = _method_setting(
        1, "second pass in every N-th step only; the others are plain steps", role="what", least=1, recorded=14
    )
    perturb_from_epoch: int = _method_setting(
        1,
        "second passes from this epoch on, counted from 1; the steps before it are plain, of one pass each",
        role="what",
        least=1,
        recorded=65,
    )
    local_attack: bool = _method_setting(
        False, "each process attacks by its own batch, rather than all by the joint one", role="what"
    )
    global_norm: bool = _method_setting(
        False,
        "sam and relatives climb the mean gradient of all processes (one more all-reduce)",
        role="what",
        recorded=15,
    )
    random_start: bool = _method_setting(
        False,
        "advprop, apart-advprop: the ascent begins at random within the radius, and each of its steps takes a pass",
        role="what",
    )
    aux_affine: bool = _method_setting(
        False,
        "advprop, fast-advprop, advbn: perturbed batches have a gamma and beta of their own in BatchNorm, which are "
        "trained, and not exported",
        role="what",
        on_resume="fixed",
    )
