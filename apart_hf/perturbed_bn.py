"""Batch normalisation with perturbed statistics (Eq. 3 of the APART paper), on a model that is left as it was found.

`perturbed_batch_norm` is the formula. `replaced_forwards` puts it in the place of the BN layers' own forward for the
length of a `with` block, `untracked_statistics` keeps running statistics out of any pass. `supported_layers` finds
the layers that can be perturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf import bn_kernels
from apart_hf.bn_kernels import ONE_GROUP, Grouping
from apart_hf.errors import ApartError


def _scale(gamma: Tensor, delta_sigma: Tensor) -> Tensor:
    return (gamma * (1 + delta_sigma)).to(gamma.dtype)  # the kernels want the dtype of beta


class _PerturbedBatchNorm(torch.autograd.Function):
    """Eq. 3 by batch-norm kernels; see `perturbed_batch_norm` for the symbols.

    With w = gamma (1 + delta_sigma), the output is w x_hat + beta - w delta_mu (mu/sigma). The last term is constant
    over a channel of a group, so neither pass of the backward touches an activation beyond what BN itself does.
    """

    @staticmethod
    def forward(ctx, x, gamma, beta, delta_mu, delta_sigma, buffers, momentum, eps, grouping, sync, shifted):
        weight = _scale(gamma, delta_sigma) if shifted else gamma
        out, mu, inv_sigma, count = bn_kernels.forward(
            x, weight, beta, weight * delta_mu if shifted else None, buffers, momentum, eps, grouping, sync
        )
        ctx.save_for_backward(x, gamma, delta_mu, delta_sigma, mu, inv_sigma, count)
        ctx.eps, ctx.grouping, ctx.sync, ctx.shifted = eps, grouping, sync, shifted
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        x, gamma, delta_mu, delta_sigma, mu, inv_sigma, count = ctx.saved_tensors
        weight = _scale(gamma, delta_sigma) if ctx.shifted else gamma
        grad_x, grad_w, grad_b = bn_kernels.backward(
            grad_out, x, weight, mu, inv_sigma, count, ctx.eps, ctx.grouping, ctx.sync, ctx.needs_input_grad[0]
        )
        grad_shift = -((mu * inv_sigma).view(ctx.grouping.groups, -1) * grad_b).sum(0)  # dL/d(w delta_mu)
        grad_w, grad_b = grad_w.sum(0), grad_b.sum(0)
        if ctx.shifted:
            grad_w = grad_w + delta_mu * grad_shift
        grad_gamma = grad_w * (1 + delta_sigma) if ctx.shifted else grad_w
        return (grad_x, grad_gamma, grad_b, weight * grad_shift, gamma * grad_w, *[None] * 6)


def perturbed_batch_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, delta_mu: Tensor, delta_sigma: Tensor, *, eps: float,
    buffers: tuple[Tensor, Tensor] | None = None, momentum: float = 0.0, grouping: Grouping = ONE_GROUP,
    sync: ProcessGroup | None = None, shifted: bool = True,
) -> Tensor:
    r"""Batch normalisation with perturbed batch statistics (Eq. 3):

        BN(x; delta_mu, delta_sigma) = gamma (1 + delta_sigma) * (x - (1 + delta_mu) mu) / sigma + beta

    with mu and sigma = sqrt(var + eps) of each group of samples (Algorithm 1, lines 7-11). mu/sigma in the shift term,
    delta_mu * mu/sigma, is a constant for autograd, as in the authors' code; the ordinary BN gradient through
    (x - mu)/sigma stays.

    Args:
        x: (N * grouping.rows, C, ...) activations.
        gamma, beta, delta_mu, delta_sigma: (C,) each, differentiable.
        eps: added to the variance.
        buffers: running (mean, var), (C,) each, updated in place with `momentum` as `F.batch_norm` does; only with one
            group and shifted=False. None: the statistics leave no trace.
        grouping: the groups that rows of x belong to.
        sync: processes whose groups share their statistics: group k is that of all of them together (SyncBatchNorm).
        shifted: False promises that both deltas are zero, and saves work; their gradients are those of Eq. 3 at zero
            (Algorithm 1, lines 1-2).

    Returns: a tensor of x's shape, dtype and memory format.
    """
    return _PerturbedBatchNorm.apply(
        x, gamma, beta, delta_mu, delta_sigma, buffers, momentum, eps, grouping, sync, shifted
    )


def _no_epilogue(layer: _BatchNorm, x: Tensor) -> Tensor:
    return x


def _drop_and_act(layer: BatchNormAct2d, x: Tensor) -> Tensor:
    return layer.act(layer.drop(x))


# What follows normalisation, by the forward that we stand in for. A subclass with a forward of its own is not here.
_EPILOGUES: dict[Callable, Callable[[nn.Module, Tensor], Tensor]] = {
    _BatchNorm.forward: _no_epilogue,
    nn.SyncBatchNorm.forward: _no_epilogue,
    BatchNormAct2d.forward: _drop_and_act,
    SyncBatchNormAct.forward: _drop_and_act,
}


def supported_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BN layers of `model` by name.

    Raises: ApartError where there is none, or one whose forward is not known to be BN followed by an activation.
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


def _shown(name: str) -> str:
    """A layer's name for a message, without the prefixes of DDP and torch.compile."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.split(".", 1)[1]
    return repr(name)


def _running_statistics(layer: _BatchNorm) -> tuple[tuple[Tensor, Tensor] | None, float]:
    """The buffers to update and their momentum, `num_batches_tracked` counted, as in `_BatchNorm.forward`."""
    momentum = 0.0 if layer.momentum is None else layer.momentum
    if layer.track_running_stats and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:  # cumulative average
            momentum = 1.0 / float(layer.num_batches_tracked)
    if not layer.track_running_stats or layer.running_mean is None:
        return None, momentum
    return (layer.running_mean, layer.running_var), momentum


def _synchronised(layer: _BatchNorm) -> ProcessGroup | None:
    """The processes that a SyncBatchNorm shares its statistics with; None: it works alone."""
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
        raise ApartError(
            f"BatchNorm layer {_shown(name)} has one value per channel in a group (input {tuple(x.shape)}, "
            f"groups={groups}); use fewer groups, so that each has two samples or more, or a larger batch."
        )
    return rows


def _affine(layer: _BatchNorm, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if layer.affine:
        return layer.weight, layer.bias
    if layer.running_mean is not None:
        dtype = layer.running_mean.dtype
    return x.new_ones(x.shape[1], dtype=dtype), x.new_zeros(x.shape[1], dtype=dtype)


def _forward(
    x: Tensor, *, layer: _BatchNorm, name: str, delta_mu: Tensor, delta_sigma: Tensor, samples: int, groups: int,
    blocks: bool, perturbed: bool, activation_eps: Tensor | None,
) -> Tensor:
    if activation_eps is not None and x.dtype in (torch.float16, torch.bfloat16):
        activation_eps.fill_(torch.finfo(x.dtype).eps)
    layer._check_input_dim(x)
    sync = _synchronised(layer)
    rows = _rows_per_sample(name, x, samples, groups, dist.get_world_size(sync) if sync else 1)
    gamma, beta = _affine(layer, x, delta_mu.dtype)
    buffers, momentum = (None, 0.0) if perturbed else _running_statistics(layer)
    out = perturbed_batch_norm(
        x, gamma, beta, delta_mu, delta_sigma, eps=layer.eps, buffers=buffers, momentum=momentum,
        grouping=Grouping(groups, rows, blocks), sync=sync, shifted=perturbed,
    )
    return _EPILOGUES[type(layer).forward](layer, out)


@contextmanager
def replaced_forwards(
    layers: Mapping[str, _BatchNorm], deltas: Mapping[str, tuple[Tensor, Tensor]], *, samples: int, groups: int = 1,
    blocks: bool = False, perturbed: bool, activation_eps: Tensor | None = None,
) -> Iterator[None]:
    """Within the block, each layer computes `perturbed_batch_norm` with its (delta_mu, delta_sigma) from `deltas`.

    perturbed=False is the clean pass: deltas must be zero, running statistics are updated. perturbed=True is the
    second pass: `groups` and `blocks` (see `Grouping`) apply, running statistics are left alone. The block must span
    forward *and* backward (gradient checkpointing re-runs the forward there). Afterwards, and after an exception, every
    layer's `__dict__` is what it was. `activation_eps`, a scalar, is set to the machine epsilon of float16 or bfloat16
    where a layer sees such activations.

    Raises: ApartError where a layer's forward is replaced already.
    """
    for name, layer in layers.items():
        if "forward" in layer.__dict__:
            raise ApartError(
                f"BatchNorm layer {_shown(name)} already has its forward replaced on the instance (a hook, an "
                "offloading wrapper, or a pass of another strategy that is still open); remove that first."
            )
    try:
        for name, layer in layers.items():
            delta_mu, delta_sigma = deltas[name]
            layer.__dict__["forward"] = partial(
                _forward, layer=layer, name=name, delta_mu=delta_mu, delta_sigma=delta_sigma, samples=samples,
                groups=groups, blocks=blocks, perturbed=perturbed, activation_eps=activation_eps,
            )
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)


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
    """Within the block, layers in training mode normalise by their batch and leave their running statistics alone."""
    before = [(layer, layer.track_running_stats) for layer in layers]
    try:
        for layer, _ in before:
            layer.track_running_stats = False
        yield
    finally:
        for layer, tracked in before:
            layer.track_running_stats = tracked
