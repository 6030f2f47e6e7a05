"""Perturbations and combination of a method, made from its hyper-parameters, and those of others taken over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from apart_hf.errors import ApartError

if TYPE_CHECKING:
    from apart_hf.strategies.combination import MeanBySamples
    from apart_hf.strategies.method import Method
    from apart_hf.strategies.perturbation import Perturbation


def made_perturbations(
    kinds: Iterable[type[Perturbation]], model: nn.Module, hyper: Mapping[str, Any], pixel_scale: Mapping[str, Any]
) -> list[Perturbation]:
    """Make perturbations of a method, each of which checks its own hyper-parameters.

    Args:
        kinds: those of the method, or some of them.
        model: the network, possibly wrapped.
        hyper: every hyper-parameter of the method.
        pixel_scale: mean and std, for those that take what images are normalised by.
    """
    made = []
    for kind in kinds:
        scale = pixel_scale if kind.takes_pixel_scale else {}
        made.append(kind(model, **{key: hyper[key] for key in kind.defaults}, **scale))
    return made


def made_combination(method: Method, model: nn.Module, hyper: Mapping[str, Any]) -> MeanBySamples:
    """Make the combination of a method, which checks its own hyper-parameters."""
    kind = method.combined_by
    return kind(model, **{key: hyper[key] for key in kind.defaults})


def take_over(perturbations: Sequence[Perturbation], made: Sequence[Perturbation], changed: frozenset[str]) -> None:
    """Give perturbations that are in use the hyper-parameters of others that were made, and so checked.

    Args:
        perturbations: in use.
        made: of the same classes, with new values.
        changed: names of what is new.

    Raises:
        ApartError: where one cannot be set. Then nothing was changed.
    """
    for old, new in zip(perturbations, made):
        lacking = [key for key in old.defaults if key in changed and not hasattr(new, key)]
        if lacking:
            raise ApartError(f"{type(old).__name__} has no attribute {lacking[0]!r}, so that it cannot be set.")
        for key in changed & old.fixed:
            raise ApartError(
                f"{key}={getattr(new, key, None)!r}: it is decided as the strategy is made, with "
                f"{getattr(old, key)!r}; make another strategy."
            )
    for old, new in zip(perturbations, made):
        for key in changed.intersection(old.defaults):
            setattr(old, key, getattr(new, key))
