"""Auxiliary batch normalisation: running statistics, and gamma and beta, of perturbed passes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf.batchnorm.patching import check_present
from apart_hf.errors import ApartError
from apart_hf.strategies.machine import processes
from apart_hf.strategies.perturbation import Perturbation
from apart_hf.strategies.scalars import checked_option
from apart_hf.strategies.wrapping import unwrapped

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_AFFINE = ("weight", "bias")


class AuxiliaryBatchNorm(Perturbation):
    """Moves nothing: in all passes but the clean one, each BN layer is its own double, as in AdvProp (Xie et al. 2020).

    The double's running statistics are those of the perturbed passes, so that the model's are of clean images alone
    (Section 4.2, Figure 3). With `aux_affine` it has a gamma and beta of its own, too, which begin as the layer's. All
    are tensors that this object holds: they are put into the layers for the length of a pass. Layers in eval mode are
    left alone, and a model without BatchNorm has no doubles.

    Args:
        model: the network, possibly wrapped.
        aux_affine: gamma and beta of its own. It is decided as the strategy is made.

    Raises:
        ApartError: where aux_affine finds no BN layer with gamma and beta.

    Example:
        >>> import timm
        >>> from apart_hf import create_strategy
        >>> strategy = create_strategy("advprop", timm.create_model("test_resnet"), aux_affine=True)
        >>> _, auxiliary = strategy.perturbations
        >>> len(auxiliary.stand_ins()) == len(list(strategy.parameters())) > 0
        True
    """

    defaults: ClassVar = {"aux_affine": False}
    counts_samples = False
    shareable = True
    fixed = frozenset({"aux_affine"})

    def __init__(self, model: nn.Module, *, aux_affine: bool):
        self.model, self.aux_affine = model, checked_option("aux_affine", aux_affine)
        named = unwrapped(model).named_modules()
        self.layers: dict[str, _BatchNorm] = {name: m for name, m in named if isinstance(m, _BatchNorm)}
        self._statistics = {
            f"{name}.{key}": tensor.detach().clone()
            for name, layer in self.layers.items()
            for key in _STATISTICS
            if (tensor := getattr(layer, key)) is not None
        }
        theirs = {
            f"{name}.{key}": tensor
            for name, layer in self.layers.items()
            for key in _AFFINE
            if aux_affine and (tensor := getattr(layer, key)) is not None
        }
        # one for each, so that what layers share is shared here
        own = {t: nn.Parameter(t.detach().clone(), requires_grad=t.requires_grad) for t in theirs.values()}
        self._affine = {key: own[tensor] for key, tensor in theirs.items()}
        if self.aux_affine and not self._affine:
            raise ApartError(
                f"aux_affine=True: {type(model).__name__} has no BatchNorm layer with gamma and beta that adversarial "
                "images could have for themselves; leave aux_affine out."
            )

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Give the parameters held here by the names that they would have in the model."""
        return iter(self._affine.items())

    def buffers(self) -> Iterator[Tensor]:
        """Give the running statistics held here."""
        return iter(self._statistics.values())

    def stand_ins(self) -> dict[nn.Parameter, nn.Parameter]:
        """Return the parameters held here, by those of the model in whose place they are."""
        return {cast(nn.Parameter, self._theirs(key)): own for key, own in self._affine.items()}

    def in_use(self) -> dict[nn.Parameter, nn.Parameter]:
        """Return those of `stand_ins` that passes now take; layers in eval mode are the model's own in all of them."""
        taken = {self._affine[key] for key in self._affine if self.layers[key.rpartition(".")[0]].training}
        return {theirs: own for theirs, own in self.stand_ins().items() if own in taken}

    def observed(self, samples: int) -> AbstractContextManager[None]:
        for key, tensor in self._statistics.items():
            self._statistics[key] = _like(tensor, self._theirs(key))
        for key, own in self._affine.items():
            own.data = _like(own.data, self._theirs(key))
        return nullcontext()

    def _theirs(self, key: str) -> Tensor:
        name, _, kind = key.rpartition(".")
        return getattr(self.layers[name], kind)

    def climbing(self, samples: int) -> Any:
        return self._in_place(tracks=False)

    def applied(self, samples: int) -> Any:
        return self._in_place(tracks=True)

    @contextmanager
    def _in_place(self, tracks: bool) -> Iterator[None]:
        check_present(self.model, self.layers)
        active = {name: layer for name, layer in self.layers.items() if layer.training}
        before = [
            (layer, dict(layer._parameters), dict(layer._buffers), layer.track_running_stats)
            for layer in active.values()
        ]
        try:
            for name, layer in active.items():
                self._put(name, layer, tracks)
            yield
        finally:
            for layer, parameters, buffers, tracked in before:
                layer._parameters.update(parameters)
                layer._buffers.update(buffers)
                layer.track_running_stats = tracked

    def _put(self, name: str, layer: _BatchNorm, tracks: bool) -> None:
        for kind in _AFFINE:
            own = self._affine.get(f"{name}.{kind}")
            if own is not None:
                # DDP awaits a gradient of every parameter of the model
                held = own if processes() == 1 else own + 0.0 * getattr(layer, kind)
                layer._parameters[kind] = held
        if layer.running_mean is not None:
            for kind in _STATISTICS:
                layer._buffers[kind] = self._statistics[f"{name}.{kind}"]
            layer.track_running_stats = tracks

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is held, by the names that it would have in the model."""
        return {key: tensor.detach().clone() for key, tensor in (self._statistics | self._affine).items()}

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a state of another model.

        Raises:
            ApartError: where names or shapes are others.
        """
        own = self._statistics | self._affine
        other = [key for key in {**own, **state} if key not in own or key not in state]
        other += [key for key in own if key in state and state[key].shape != own[key].shape]
        if other:
            raise ApartError(
                f"the state's auxiliary BatchNorm is of another model, or made with another aux_affine: {other[0]!r} "
                "differs; load the state of a strategy of the same model and options."
            )

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what `state_dict` returned."""
        for key, tensor in (self._statistics | self._affine).items():
            tensor.copy_(state[key])


def auxiliary_of(perturbations: Sequence[Perturbation]) -> list[AuxiliaryBatchNorm]:
    """Find the auxiliary BN among perturbations."""
    return [p for p in perturbations if isinstance(p, AuxiliaryBatchNorm)]


def stand_ins_of(perturbations: Sequence[Perturbation]) -> dict[nn.Parameter, nn.Parameter]:
    """Return the parameters that perturbations hold, by those of the model in whose place they are."""
    return {theirs: own for p in auxiliary_of(perturbations) for theirs, own in p.stand_ins().items()}


def in_use_of(perturbations: Sequence[Perturbation]) -> dict[nn.Parameter, nn.Parameter]:
    """Return those of `stand_ins_of` that the passes now take."""
    return {theirs: own for p in auxiliary_of(perturbations) for theirs, own in p.in_use().items()}


def share_parameters(perturbations: Sequence[Perturbation], others: Sequence[Perturbation]) -> None:
    """Let others, made for another form of the same model, hold the very parameters that perturbations hold.

    An optimizer that has them then trains those of both.
    """
    for mine, other in zip(auxiliary_of(perturbations), auxiliary_of(others)):
        other._affine = dict(mine._affine)


def check_trained(perturbations: Sequence[Perturbation], *, keeps_clean_gradient: bool) -> None:
    """Refuse to train by passes none of which has the model's own gamma and beta.

    Raises:
        ApartError: where there is an auxiliary gamma and beta, and the gradient of the clean pass is dropped.
    """
    if not keeps_clean_gradient and stand_ins_of(perturbations):
        raise ApartError(
            "aux_affine=True: the perturbed pass alone is trained on, and in it the auxiliary gamma and beta are in "
            "the place of the model's, which would stay as they are; leave aux_affine out, or "
            "keeps_clean_gradient=False."
        )


def check_statistics(perturbations: Sequence[Perturbation]) -> None:
    """Refuse auxiliary statistics that no pass would update.

    Raises:
        ApartError: where another perturbation normalises by statistics of its own, or auxiliary BN is there twice.
    """
    held = auxiliary_of(perturbations)
    if len(held) > 1:
        raise ApartError(
            f"{len(held)} objects AuxiliaryBatchNorm are given, and a pass has the statistics of one of them; give one."
        )
    others = [type(p).__name__ for p in perturbations if p.replaces_statistics]
    if held and others:
        raise ApartError(
            f"AuxiliaryBatchNorm is given beside {others[0]}, which normalises groups by statistics of their own, so "
            "that no pass would update the auxiliary ones; leave AuxiliaryBatchNorm out."
        )


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """Move a tensor to where another is: the model may move after the strategy was made."""
    return tensor.to(other.device, other.dtype)
