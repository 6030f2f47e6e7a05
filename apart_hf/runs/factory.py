"""timm's factory of models, with weights from a file in the place of its own, and with settings of BatchNorm."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterable, Iterator
from typing import Any

import timm
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf.errors import ApartError, first_line
from apart_hf.models import pretrained_cfg


def read_weights(flag: str, file: str) -> dict[str, Tensor]:
    """Read the state_dict of a file, of safetensors or of torch, as timm does.

    Args:
        flag: that names the file, for messages.
        file: its path.

    Raises:
        ApartError: where it is not there, or cannot be read without running code from it.
    """
    if not os.path.isfile(file):  # False for a name that no file can have
        raise ApartError(f"{flag} {file}: there is no such file.")
    try:
        return load_state_dict(file, weights_only=True)
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        EOFError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        raise ApartError(f"{flag} {file}: cannot be read ({first_line(error)}).") from error


def create_model(
    name: str, *, weights: str | None = None, bn_momentum: float | None = None, bn_eps: float | None = None, **more: Any
) -> nn.Module:
    """Make a model.

    Args:
        name: timm's.
        weights: a file that stands for timm's weights of it: its classifier is left out.
        bn_momentum, bn_eps: of every BatchNorm layer; None: the model's own. timm builds some models, those of
            EfficientNet's kind, with any; of others the momentum is set afterwards, since it has no part in what an
            export computes, and another eps is refused.
        **more: of `timm.create_model`.

    Raises:
        ApartError: where the weights are of another model, or the model has no such eps.
    """
    if weights is None:
        return _with_batchnorm(name, bn_momentum, bn_eps, more)
    state = read_weights("--pretrained-path", weights)
    # as timm's script has it: -1 classes, so that the classifier is always another
    more |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state, "num_classes": -1, "source": ""}}
    try:
        with _recorded_loading() as loaded:
            model = _with_batchnorm(name, bn_momentum, bn_eps, more)
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ApartError(f"--pretrained-path {weights}: its weights are of another model ({reason}).") from error
    config = pretrained_cfg(model)
    config |= {"state_dict": None, "num_classes": more.get("num_classes", 1000)}  # else an export would hold them
    _check_loaded(weights, loaded, [*_names(config.get("classifier")), *_names(config.get("first_conv"))])
    return model


def _with_batchnorm(name: str, momentum: float | None, eps: float | None, more: dict[str, Any]) -> nn.Module:
    asked = {"bn_momentum": momentum, "bn_eps": eps}
    own: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    try:
        model = timm.create_model(name, **own, **more)
    except TypeError as error:
        if not own or not any(f"'{key}'" in str(error) for key in own):
            raise
        if eps is not None:
            raise ApartError(
                f"--bn-eps {eps:g}: timm builds {name!r} with its own epsilon alone, and an export could not say "
                "another; leave the flag out, or take a model of EfficientNet's kind."
            ) from error
        model = timm.create_model(name, **more)
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    if eps is not None and any(layer.eps != eps for layer in layers):
        raise ApartError(f"--bn-eps {eps:g}: timm builds some layers of {name!r} with another; leave the flag out.")
    for layer in layers:
        layer.momentum = layer.momentum if momentum is None else momentum
    return model


@contextlib.contextmanager
def _recorded_loading() -> Iterator[list[Any]]:
    """Keep what loading a state_dict found missing or too much, of which timm tells a log alone."""
    found: list[Any] = []
    load = nn.Module.load_state_dict

    def recorded(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        found.append(load(self, *arguments, **options))
        return found[-1]

    nn.Module.load_state_dict = recorded  # type: ignore[method-assign]
    try:
        yield found
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


def _check_loaded(file: str, loaded: list[Any], free: Iterable[str]) -> None:
    """Raise where layers other than those that may be `free` were missing, or too many."""
    keys = [key for result in loaded for key in (*result.missing_keys, *result.unexpected_keys)]
    wrong = [key for key in keys if key.rpartition(".")[0] not in free]
    if wrong:
        raise ApartError(
            f"--pretrained-path {file}: its weights are of another model ({len(wrong)} of their names differ, the "
            f"first is {wrong[0]!r})."
        )


def _names(layers: Any) -> tuple[str, ...]:
    """Name the layers of an entry of timm's description, which may be one, several or none."""
    return (layers,) if isinstance(layers, str) else tuple(layers or ())
