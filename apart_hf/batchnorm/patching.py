"""Eq. 3 in the place of the forwards of a model's BN layers, for the length of a `with` block, and out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf.batchnorm.affine import LayerParameters, affine_of, affine_of_all
from apart_hf.batchnorm.functional import shifted_batch_norm
from apart_hf.batchnorm.layouts import Grouping
from apart_hf.batchnorm.normalised import Normalisation
from apart_hf.batchnorm.shared import Shared
from apart_hf.errors import ApartError


class TooFewValues(ApartError):
    """A group has one value per channel in some layer, so that it has no variance."""


def _no_epilogue(layer: _BatchNorm, x: Tensor) -> Tensor:
    return x


def _drop_and_act(layer: BatchNormAct2d, x: Tensor) -> Tensor:
    return layer.act(layer.drop(x))


# What follows normalisation, by the forward that we stand in for. A subclass with a forward of its own is not here.
_EPILOGUES: dict[Callable[..., Tensor], Callable[[Any, Tensor], Tensor]] = {
    _BatchNorm.forward: _no_epilogue,
    nn.SyncBatchNorm.forward: _no_epilogue,
    BatchNormAct2d.forward: _drop_and_act,
    SyncBatchNormAct.forward: _drop_and_act,
}


def supported_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Find the BN layers of `model` by name.

    Raises:
        ApartError: where there is none, or one whose forward is not known to be BN followed by an activation.
    """
    layers = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, _BatchNorm):
            continue
        if type(layer).forward not in _EPILOGUES:
            raise ApartError(
                f"BatchNorm layer {_shown(name)} is a {type(layer).__name__}, whose own forward cannot be perturbed; "
                "replace it by BatchNorm2d or timm's BatchNormAct2d, or use a method that leaves BatchNorm alone (sam)."
            )
        layers[name] = layer
    if not layers:
        raise ApartError(
            f"{type(model).__name__} has no BatchNorm layer, and APART perturbs nothing else; "
            "take a BatchNorm model (timm.list_models('*resnet*')) or the method 'sam' or 'standard'."
        )
    return layers


def check_present(model: nn.Module, layers: Mapping[str, _BatchNorm]) -> None:
    """Refuse a model that has lost a BN layer which was found in it earlier.

    Raises:
        ApartError: where one was replaced.
    """
    there = set(model.modules())
    for name, layer in layers.items():
        if layer not in there:
            raise ApartError(
                f"BatchNorm layer {_shown(name)} was replaced after the strategy was made (by "
                "convert_sync_batchnorm?); make the strategy once the model is as it is trained."
            )


def _shown(name: str) -> str:
    """Write a layer's name for a message, without the prefixes of DDP and torch.compile."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.split(".", 1)[1]
    return repr(name)


def _synchronised(layer: _BatchNorm) -> ProcessGroup | None:
    """Return the processes that a SyncBatchNorm shares its statistics with; None: it works alone."""
    if not isinstance(layer, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
        return None
    group = layer.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _rows_per_sample(name: str, x: Tensor, samples: int, groups: int, processes: int) -> int:
    rows = x.shape[0] // samples if groups > 1 else 1
    if groups > 1 and rows * samples != x.shape[0]:
        raise ApartError(
            f"BatchNorm layer {_shown(name)} sees {x.shape[0]} rows for {samples} samples, so rows cannot be told "
            "apart by sample; use groups=1."
        )
    values = x.numel() // (x.shape[1] * groups)
    if values * processes < 2:
        raise TooFewValues(
            f"BatchNorm layer {_shown(name)} has one value per channel in a group (input {tuple(x.shape)}, "
            f"groups={groups}); use fewer groups, so that each has two samples or more, or a larger batch."
        )
    return rows


def _parameters(layer: _BatchNorm, deltas: tuple[Tensor, Tensor]) -> LayerParameters:
    if layer.affine:
        return LayerParameters(layer.weight, layer.bias, *deltas)
    like = deltas[0] if layer.running_mean is None else layer.running_mean
    ones = torch.ones(layer.num_features, dtype=like.dtype, device=deltas[0].device)
    return LayerParameters(ones, torch.zeros_like(ones), *deltas)


def _forward(
    x: Tensor,
    *,
    layer: _BatchNorm,
    name: str,
    deltas: tuple[Tensor, Tensor],
    shared: Shared,
    samples: int,
    groups: int,
    blocks: bool,
    perturbed: bool,
    activation_eps: Tensor | None,
) -> Tensor:
    if activation_eps is not None:
        shared.mark(activation_eps, x.dtype)
    layer._check_input_dim(x)
    sync = _synchronised(layer)
    rows = _rows_per_sample(name, x, samples, groups, dist.get_world_size(sync) if sync else 1)
    # a compiler fuses what each layer computes, and would compile anew for the fresh tensors of all
    affine = None if torch.compiler.is_compiling() else shared.affine(name)
    if affine is None:
        affine = affine_of(_parameters(layer, deltas), groups)
    buffers, momentum = (None, 0.0) if perturbed else shared.running_statistics(layer)
    how = Normalisation(layer.eps, buffers, momentum, Grouping(groups, rows, blocks), sync, shifted=perturbed)
    out = shifted_batch_norm(x, affine, how)
    return _EPILOGUES[type(layer).forward](layer, out)


@contextmanager
def replaced_forwards(
    layers: Mapping[str, _BatchNorm],
    deltas: Mapping[str, tuple[Tensor, Tensor]],
    *,
    samples: int,
    groups: int = 1,
    blocks: bool = False,
    perturbed: bool,
    together: bool = True,
    shared: Shared | None = None,
    activation_eps: Tensor | None = None,
) -> Iterator[None]:
    """Let each layer compute `perturbed_batch_norm` with its (delta_mu, delta_sigma) from `deltas`, within the block.

    perturbed=False is the clean pass: deltas must be zero, running statistics are updated. perturbed=True is the
    second pass: `groups` and `blocks` (see `Grouping`) apply, running statistics are left alone. The block must span
    forward *and* backward (gradient checkpointing re-runs the forward there). Afterwards, and after an exception, every
    layer's `__dict__` is what it was. `activation_eps`, a scalar, is set to the machine epsilon of float16 or bfloat16
    where a layer sees such activations.

    With `together`, what is per channel is computed for all layers as the first of them runs that is not compiled, from
    the weights at that moment, and their gradients as the backward ends. Without it each layer does so by itself:
    gradients of gamma and beta are there as soon as its backward was, which lets DDP reduce them while the backward
    goes on. `shared` is to be one object for all passes where the model may be compiled.

    Raises:
        ApartError: where a layer's forward is replaced already.
    """
    for name, layer in layers.items():
        if "forward" in layer.__dict__:
            raise ApartError(
                f"BatchNorm layer {_shown(name)} already has its forward replaced on the instance (a hook, an "
                "offloading wrapper, or a pass of another strategy that is still open); remove that first."
            )
    shared = Shared() if shared is None else shared
    if together:
        shared.make_affine = lambda: affine_of_all(
            {name: _parameters(layer, deltas[name]) for name, layer in layers.items()}, groups, shifted=perturbed
        )
    try:
        for name, layer in layers.items():
            layer.__dict__["forward"] = partial(
                _forward,
                layer=layer,
                name=name,
                deltas=deltas[name],
                shared=shared,
                samples=samples,
                groups=groups,
                blocks=blocks,
                perturbed=perturbed,
                activation_eps=activation_eps,
            )
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)
        shared.end()


@contextmanager
def kept_buffers(buffers: Iterable[tuple[Tensor, int]]) -> Iterator[None]:
    """Undo at the end what the block does to those (buffer, version) that were written to since the version was taken.

    For layers that keep running statistics without being a `_BatchNorm` (EvoNorm): what the clean pass updates, the
    perturbed pass would update again.
    """
    before = [(buffer, buffer.clone()) for buffer, version in buffers if buffer._version != version]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


@contextmanager
def untracked_statistics(layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Let layers in training mode normalise by their batch and keep their running statistics, within the block."""
    before = [(layer, layer.track_running_stats) for layer in layers]
    try:
        for layer, _ in before:
            layer.track_running_stats = False
        yield
    finally:
        for layer, tracked in before:
            layer.track_running_stats = tracked
