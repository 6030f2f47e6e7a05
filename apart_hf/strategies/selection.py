"""The method that a caller asks for: one of the table, or perturbations of a list, by name or as objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from apart_hf.errors import ApartError
from apart_hf.strategies.auxiliary_batchnorm import AuxiliaryBatchNorm
from apart_hf.strategies.checks import check_model
from apart_hf.strategies.combination import MeanBySamples, PerturbedAlone
from apart_hf.strategies.method import Method
from apart_hf.strategies.perturbation import Perturbation


class Given:
    """Stands for an object in a method's list of perturbations, where others have classes.

    Args:
        perturbation: that the caller has made.

    Attributes:
        defaults: its hyper-parameters as they are.

    Raises:
        ApartError: where it does not keep a hyper-parameter under its name.
    """

    def __init__(self, perturbation: Perturbation):
        self.perturbation, self.further_passes = perturbation, perturbation.further_passes
        self.takes_pixel_scale = perturbation.takes_pixel_scale
        self.replaces_statistics = perturbation.replaces_statistics
        for key in perturbation.defaults:
            if not hasattr(perturbation, key):
                raise ApartError(
                    f"{type(perturbation).__name__} has no attribute {key!r}, which its defaults name; keep what the "
                    f"constructor is given: self.{key} = {key}."
                )
        self.defaults = {key: getattr(perturbation, key) for key in perturbation.defaults}

    def __call__(self, model: nn.Module, **options: Any) -> Perturbation:
        """Return the object, or, for other hyper-parameters, one of its class, which checks them."""
        if all(options[key] == getattr(self.perturbation, key) for key in self.defaults):  # as `set` left them
            return self.perturbation
        return type(self.perturbation)(model, **options)


def listed_method(
    wanted: Sequence[str | Perturbation],
    model: nn.Module,
    table: Mapping[str, Method],
    hyper: Iterable[str],
    keeps_clean_gradient: bool,
) -> tuple[str, Method]:
    """Make the method of a list: all its perturbations at once.

    Args:
        wanted: methods by name, which lend their perturbations, and a caller's own objects.
        model: the network, possibly wrapped.
        table: of methods, all names of which are known.
        hyper: names of hyper-parameters that are given beside it.
        keeps_clean_gradient: see `Method`.

    Returns:
        Its name for messages and states, and the method.

    Raises:
        ApartError: where one is neither, or of another model, or there twice, or two have one hyper-parameter with
            different values, or it is given beside an object that has it.
    """
    check_model(model)
    made: list[Any] = []
    defaults: dict[str, Any] = {}
    for one in wanted:
        if isinstance(one, str):
            method = table[one]
            if method.combined_by not in (MeanBySamples, PerturbedAlone):
                raise ApartError(f"method {one!r} decides how gradients are combined; use it alone, by its name.")
            made += (p for p in method.perturbations if not (p.shareable and p in made))
            new = {key: method.hyper_parameters()[key] for p in method.perturbations for key in p.defaults}
        else:
            given = Given(_checked(one, model))
            made.append(given)
            new = given.defaults
            for key in new.keys() & set(hyper):
                raise ApartError(
                    f"{key}= is given beside a {type(one).__name__}, which has {key}={new[key]!r}; give it to the "
                    "object, or change it by strategy.set."
                )
        for key in new.keys() & defaults.keys() - set(hyper):
            if new[key] != defaults[key]:
                raise ApartError(
                    f"two of the perturbations have {key}, {defaults[key]!r} and {new[key]!r}; a strategy has one of "
                    "each name, so give both the same."
                )
        defaults |= new
    if any(one.replaces_statistics for one in made):
        made = _without_auxiliary(made, defaults, hyper)
    kinds = [one.perturbation if isinstance(one, Given) else one for one in made]
    for kind in kinds:
        if sum(kind in (other, type(other)) for other in kinds) > 1:
            title = (kind if isinstance(kind, type) else type(kind)).__name__
            raise ApartError(f"{title} is in the list twice; name each perturbation once.")
    if not made:
        raise ApartError("the list has no perturbation; name some, or use the method 'standard' for plain steps.")
    names = "+".join(one if isinstance(one, str) else type(one).__name__ for one in wanted)
    return names, Method(f"{names} at once", tuple(made), keeps_clean_gradient, defaults)


def _without_auxiliary(made: list[Any], defaults: dict[str, Any], hyper: Iterable[str]) -> list[Any]:
    """Leave out auxiliary BN beside groups that are normalised by statistics of their own, as in apart-advprop."""
    stays = [one for one in made if one is not AuxiliaryBatchNorm]
    left_out = AuxiliaryBatchNorm.defaults if len(stays) < len(made) else {}
    for key in left_out.keys() - {key for one in stays for key in one.defaults}:
        del defaults[key]
        if key in hyper:
            raise ApartError(
                f"{key}= is given for auxiliary BN, which a list has not where groups are normalised apart (apart, "
                f"random-bn, ghost-bn); leave {key} out."
            )
    return stays


def _checked(one: Any, model: nn.Module) -> Perturbation:
    """Return what is a perturbation of this model."""
    if isinstance(one, type):
        raise ApartError(f"{one.__name__} is a class; pass an object: {one.__name__}(model).")
    if not isinstance(one, Perturbation):
        raise ApartError(
            f"the list holds an object of type {type(one).__name__}; it takes names of methods and objects of classes "
            "that inherit from apart_hf.Perturbation."
        )
    own = getattr(one, "model", None)
    weights = {id(p) for p in model.parameters()}
    if not isinstance(own, nn.Module) or not all(id(p) in weights for p in own.parameters()):
        raise ApartError(
            f"{type(one).__name__} was made for another model than the strategy's; make it of the same one, and call "
            "super().__init__(model) in its constructor."
        )
    return one
