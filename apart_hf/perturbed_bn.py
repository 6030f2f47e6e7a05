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
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf.errors import ApartError


def is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def fold_groups(x: Tensor, groups: int, rows_per_sample: int = 1) -> Tensor:
    """Give each group of samples channels of its own: (N*k, C, ...) -> (N*k/groups, groups*C, ...).

    Sample i belongs to group i mod `groups`. For contiguous (N, C, ...) tensors this is a view. Where a layer sees k
    rows per sample (tokens, windows), the rows of a sample lie side by side and stay in its group.
    """
    if groups == 1:
        return x
    rows, channels, *space = x.shape
    if rows_per_sample > 1:
        x = x.reshape(-1, groups, rows_per_sample, channels, *space).transpose(1, 2)
    return x.reshape(rows // groups, groups * channels, *space)


def unfold_groups(x: Tensor, like: Tensor, groups: int, rows_per_sample: int = 1) -> Tensor:
    """The inverse of `fold_groups`, in the memory format of `like`."""
    if groups == 1:
        return x
    if rows_per_sample > 1:
        channels, *space = like.shape[1:]
        x = x.reshape(-1, rows_per_sample, groups, channels, *space).transpose(1, 2)
    # not a view: an in-place activation may follow, which autograd forbids on views made inside a Function
    out = torch.ops.aten._unsafe_view(x.reshape(like.shape), like.shape)
    if is_channels_last(like):
        out = out.contiguous(memory_format=torch.channels_last)
    return out


def _scale(gamma: Tensor, delta_sigma: Tensor) -> Tensor:
    return (gamma * (1 + delta_sigma)).to(gamma.dtype)  # the kernels want the dtype of beta


class _PerturbedBatchNorm(torch.autograd.Function):
    """Eq. 3 by the framework's own batch-norm kernels; see `perturbed_batch_norm` for the symbols.

    With w = gamma (1 + delta_sigma), the output is w x_hat + beta - w delta_mu (mu/sigma). The last term is constant
    over a channel of a group, so neither pass of the backward touches an activation beyond what BN itself does.
    """

    @staticmethod
    def forward(ctx, x, gamma, beta, delta_mu, delta_sigma, buffers, momentum, eps, groups, rows_per_sample, shifted):
        weight = _scale(gamma, delta_sigma) if shifted else gamma
        mean, var = buffers if buffers is not None else (None, None)
        out, mu, inv_sigma = torch.native_batch_norm(
            fold_groups(x, groups, rows_per_sample),
            weight.repeat(groups), beta.repeat(groups), mean, var, True, momentum, eps,
        )
        if shifted:
            shift = (weight * delta_mu).repeat(groups) * (mu * inv_sigma)
            out.sub_(shift.view(1, -1, *[1] * (x.dim() - 2)))
        ctx.save_for_backward(x, gamma, delta_mu, delta_sigma, mu, inv_sigma)
        ctx.eps, ctx.groups, ctx.rows_per_sample, ctx.shifted = eps, groups, rows_per_sample, shifted
        return unfold_groups(out, x, groups, rows_per_sample)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        x, gamma, delta_mu, delta_sigma, mu, inv_sigma = ctx.saved_tensors
        groups, rows = ctx.groups, ctx.rows_per_sample
        weight = _scale(gamma, delta_sigma) if ctx.shifted else gamma
        grad_x, grad_w, grad_b = torch.ops.aten.native_batch_norm_backward(
            fold_groups(grad_out, groups, rows), fold_groups(x, groups, rows), weight.repeat(groups),
            None, None, mu, inv_sigma, True, ctx.eps, [ctx.needs_input_grad[0], True, True],
        )
        if grad_x is not None:
            grad_x = unfold_groups(grad_x, x, groups, rows)
        grad_w, grad_b = grad_w.view(groups, -1), grad_b.view(groups, -1)
        grad_shift = -((mu * inv_sigma).view(groups, -1) * grad_b).sum(0)  # dL/d(w delta_mu)
        grad_w, grad_b = grad_w.sum(0), grad_b.sum(0)
        if ctx.shifted:
            grad_w = grad_w + delta_mu * grad_shift
        grad_gamma = grad_w * (1 + delta_sigma) if ctx.shifted else grad_w
        return (grad_x, grad_gamma, grad_b, weight * grad_shift, gamma * grad_w, *[None] * 6)


def perturbed_batch_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, delta_mu: Tensor, delta_sigma: Tensor, *, eps: float,
    buffers: tuple[Tensor, Tensor] | None = None, momentum: float = 0.0, groups: int = 1, rows_per_sample: int = 1,
    shifted: bool = True,
) -> Tensor:
    r"""Batch normalisation with perturbed batch statistics (Eq. 3):

        BN(x; delta_mu, delta_sigma) = gamma (1 + delta_sigma) * (x - (1 + delta_mu) mu) / sigma + beta

    with mu and sigma = sqrt(var + eps) of each group of samples (Algorithm 1, lines 7-11), sample i being in group
    i mod `groups`. mu/sigma in the shift term, delta_mu * mu/sigma, is a constant for autograd, as in the authors'
    code; the ordinary BN gradient through (x - mu)/sigma stays.

    Args:
        x: (N * rows_per_sample, C, ...) activations.
        gamma, beta, delta_mu, delta_sigma: (C,) each, differentiable.
        eps: added to the variance.
        buffers: running (mean, var), (C,) each, updated in place with `momentum` as `F.batch_norm` does; only with one
            group. None: the statistics leave no trace.
        groups: number of groups; divides N.
        rows_per_sample: rows of x that one sample has in this layer.
        shifted: False promises that both deltas are zero, and saves the pass over x that the shift takes; their
            gradients are those of Eq. 3 at zero (Algorithm 1, lines 1-2).

    Returns: a tensor of x's shape, dtype and memory format.
    """
    return _PerturbedBatchNorm.apply(
        x, gamma, beta, delta_mu, delta_sigma, buffers, momentum, eps, groups, rows_per_sample, shifted
    )


def _no_epilogue(layer: _BatchNorm, x: Tensor) -> Tensor:
    return x


def _drop_and_act(layer: BatchNormAct2d, x: Tensor) -> Tensor:
    return layer.act(layer.drop(x))


# What follows normalisation, by the forward that we stand in for. A subclass with a forward of its own is not here.
_EPILOGUES: dict[Callable, Callable[[nn.Module, Tensor], Tensor]] = {
    _BatchNorm.forward: _no_epilogue,
    BatchNormAct2d.forward: _drop_and_act,
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


def _rows_per_sample(name: str, x: Tensor, samples: int, groups: int) -> int:
    rows = x.shape[0] // samples if groups > 1 else 1
    if groups > 1 and rows * samples != x.shape[0]:
        raise ApartError(
            f"BatchNorm layer {_shown(name)} sees {x.shape[0]} rows for {samples} samples, so rows cannot be told "
            "apart by sample; use groups=1."
        )
    values = x.numel() // (x.shape[1] * groups)
    if values < 2:
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
    perturbed: bool,
) -> Tensor:
    layer._check_input_dim(x)
    rows_per_sample = _rows_per_sample(name, x, samples, groups)
    gamma, beta = _affine(layer, x, delta_mu.dtype)
    buffers, momentum = (None, 0.0) if perturbed else _running_statistics(layer)
    out = perturbed_batch_norm(
        x, gamma, beta, delta_mu, delta_sigma, eps=layer.eps, buffers=buffers, momentum=momentum, groups=groups,
        rows_per_sample=rows_per_sample, shifted=perturbed,
    )
    return _EPILOGUES[type(layer).forward](layer, out)


@contextmanager
def replaced_forwards(
    layers: Mapping[str, _BatchNorm], deltas: Mapping[str, tuple[Tensor, Tensor]], *, samples: int, groups: int = 1,
    perturbed: bool,
) -> Iterator[None]:
    """Within the block, each layer computes `perturbed_batch_norm` with its (delta_mu, delta_sigma) from `deltas`.

    perturbed=False is the clean pass: deltas must be zero, running statistics are updated. perturbed=True is the
    second pass: `groups` apply, running statistics are left alone. The block must span forward *and* backward
    (gradient checkpointing re-runs the forward there). Afterwards, and after an exception, every layer's `__dict__`
    is what it was.
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
                groups=groups, perturbed=perturbed,
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
