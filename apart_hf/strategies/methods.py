"""The methods by name: which perturbations each combines, and the strategy that is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import nn

from apart_hf.errors import ApartError, unknown_name
from apart_hf.strategies.auxiliary_batchnorm import AuxiliaryBatchNorm
from apart_hf.strategies.bn_perturbations import AdversarialStatistics, GroupStatistics, RandomStatistics
from apart_hf.strategies.combination import Balanced, SurrogateGap
from apart_hf.strategies.feature_perturbations import FeatureStatistics
from apart_hf.strategies.hyper_parameters import MethodName
from apart_hf.strategies.input_perturbations import Inputs, OneStepInputs
from apart_hf.strategies.method import Method as Method
from apart_hf.strategies.perturbation import Perturbation
from apart_hf.strategies.scalars import checked_option
from apart_hf.strategies.selection import listed_method
from apart_hf.strategies.weight_perturbations import AdaptiveWeights, NormalisationWeights, RelativeWeights, Weights

METHODS: dict[str, Method] = {
    "standard": Method("one ordinary pass"),
    "apart": Method("perturbed BN statistics (Algorithm 1)", (AdversarialStatistics,)),
    "sam": Method("perturbed weights (Foret et al. 2021)", (Weights,), keeps_clean_gradient=False),
    "apart-sam": Method("both at once (Section 3.3)", (AdversarialStatistics, Weights), defaults={"rho": 0.2}),
    "asam": Method(
        "weights perturbed relative to their size (Kwon et al. 2021)", (AdaptiveWeights,), keeps_clean_gradient=False
    ),
    "apart-asam": Method("apart and asam at once", (AdversarialStatistics, AdaptiveWeights)),
    "sam-on": Method(
        "weights of normalisation layers (Mueller et al. 2023)", (NormalisationWeights,), keeps_clean_gradient=False
    ),
    "gsam": Method(
        "sam, and the surrogate gap (Zhuang et al. 2022)", (Weights,), defaults={"rho": 0.04}, combination=SurrogateGap
    ),
    "awp": Method(
        "weights perturbed by a share of their norms (Wu et al. 2020)", (RelativeWeights,), keeps_clean_gradient=False
    ),
    "random-bn": Method("apart with random signs", (RandomStatistics,)),
    "ghost-bn": Method("apart with groups only, epsilon 0", (GroupStatistics,)),
    "advprop": Method("perturbed images and auxiliary BN (Xie et al. 2020)", (Inputs, AuxiliaryBatchNorm)),
    "fast-advprop": Method(
        "the same of some images, in one step (Mei et al. 2022)",
        (OneStepInputs, AuxiliaryBatchNorm),
        defaults={"ratio": 0.25},
        combination=Balanced,
    ),
    "advbn": Method("statistics of one layer's features (Shu et al. 2021)", (FeatureStatistics, AuxiliaryBatchNorm)),
    "apart-advprop": Method(
        "apart and perturbed images at once", (AdversarialStatistics, Inputs), defaults={"steps": 1}
    ),
}


def list_strategies() -> list[MethodName]:
    """List the methods by name.

    Returns:
        The names that `create_strategy` takes, in the order of the table `METHODS`.

    Example:
        >>> from apart_hf import list_strategies
        >>> list_strategies()[:4]
        ['standard', 'apart', 'sam', 'apart-sam']
    """
    return cast(list[MethodName], list(METHODS))


def chosen_method(
    name: Any, model: nn.Module, hyper: Iterable[str], keeps_clean_gradient: bool | None = None
) -> tuple[str, Method]:
    """Find a method by its name, or make that of a list, see `create_strategy`.

    Returns:
        Its name, and the method.

    Raises:
        ApartError: as `check_hyper_parameters` and `listed_method` do.
    """
    kind = name if isinstance(name, type) else type(name)
    if issubclass(kind, Perturbation):
        raise ApartError(
            f"{kind.__name__} is a perturbation, and no name of a method; pass a list of objects: "
            f"[{kind.__name__}(model)]."
        )
    if not isinstance(name, Sequence) or isinstance(name, str):
        check_hyper_parameters(name, hyper)
        if keeps_clean_gradient is not None:
            raise ApartError(
                f"keeps_clean_gradient={keeps_clean_gradient!r}: the method {name!r} decides that; leave it out, or "
                f"pass a list of perturbations, [{name!r}]."
            )
        return name, METHODS[name]
    for one in name:
        if isinstance(one, str):
            check_hyper_parameters(one, ())
    keeps = True if keeps_clean_gradient is None else checked_option("keeps_clean_gradient", keeps_clean_gradient)
    title, method = listed_method(name, model, METHODS, hyper, keeps)
    _check_known(title, method, hyper)
    return title, method


def check_hyper_parameters(name: str, hyper: Iterable[str]) -> dict[str, Any]:
    """Return the hyper-parameters of the method `name` with their defaults.

    Raises:
        ApartError: where there is no such method, or it lacks one that is named in `hyper`.
    """
    if not isinstance(name, str):
        raise ApartError(
            f"the name of a method comes first, and is one of {', '.join(METHODS)}; it was given an object of type "
            f"{type(name).__name__}."
        )
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return _check_known(name, METHODS[name], hyper)


def _check_known(name: str, method: Method, hyper: Iterable[str]) -> dict[str, Any]:
    known = method.hyper_parameters()
    for key in hyper:
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ApartError(f"method {name!r} has no hyper-parameter {key!r}; {has}.")
    return known
