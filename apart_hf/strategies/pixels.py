"""Images of a batch, and the pixels that they are made of: which tensor they are, and what its values mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apart_hf.errors import ApartError, written
from apart_hf.strategies.batches import map_tensors
from apart_hf.strategies.scalars import is_finite, python_number


def pixel_scale(
    model: nn.Module, mean: float | Sequence[float] | None, std: float | Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """Find by which mean and deviation images are normalised: (pixel / 255 - mean) / std, for each channel.

    Args:
        model: the network, possibly wrapped; its `pretrained_cfg`, or that of a part of it, tells what is not given.
        mean, std: one value, or one for each channel; None: the model's.

    Raises:
        ApartError: where they are not known, or are none.
    """
    if mean is None and std is None:
        for module in model.modules():
            config = getattr(module, "pretrained_cfg", None)
            found = [config.get(k) if isinstance(config, dict) else getattr(config, k, None) for k in ("mean", "std")]
            if all(value is not None for value in found):
                mean, std = found
                break
    if mean is None or std is None:
        lacking = "mean and std" if mean is std else "mean" if mean is None else "std"
        raise ApartError(
            f"the method moves pixels, and {lacking} of the images' normalisation is not known: "
            f"{type(model).__name__} has no pretrained_cfg that tells; pass mean=[0.485, 0.456, 0.406], "
            "std=[0.229, 0.224, 0.225], or what the images are normalised by."
        )
    return _numbers("mean", mean), _numbers("std", std, above=0.0)


def _numbers(name: str, values: Any, above: float = -math.inf) -> list[float]:
    several = isinstance(values, (Sequence, np.ndarray, Tensor)) and getattr(values, "ndim", 1) != 0
    found = [python_number(value) for value in (values if several and not isinstance(values, bytes) else [values])]
    if not found or not all(is_finite(value) and value > above for value in found):
        kind = "numbers" if above == -math.inf else f"numbers above {above:g}"
        raise ApartError(f"{name}={written(values)}: finite {kind} are needed, one, or one for each channel.")
    return [float(value) for value in found]


def find_images(batch: Any) -> Tensor:
    """Find the images of a batch: its one floating-point tensor of 4 dimensions.

    Where there are several, and the batch is a pair such as (images, targets), those of its first item count alone.

    Args:
        batch: of any kind.

    Returns:
        The tensor, (M, C, H, W).

    Raises:
        ApartError: where there is none, or it cannot be told which it is.
    """
    found = _images(batch)
    if len(found) > 1 and isinstance(batch, (tuple, list)):
        found = _images(batch[0]) or found
    if len(found) == 1:
        return found[0]
    if not found:
        problem = "no floating-point tensor of 4 dimensions (samples, channels, height, width)"
        cure = "give it normalised images"
    else:
        shapes = ", ".join(str(tuple(images.shape)) for images in found)
        problem = f"{len(found)} floating-point tensors of 4 dimensions ({shapes})"
        cure = "make it a pair (images, targets)"
    raise ApartError(
        f"the method moves the pixels of images, and the batch ({type(batch).__name__}) has {problem}; {cure}."
    )


def _images(batch: Any) -> list[Tensor]:
    found: dict[int, Tensor] = {}

    def look(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.is_floating_point():
            found[id(tensor)] = tensor
        return tensor

    map_tensors(look, batch)
    return list(found.values())


def with_images(batch: Any, images: Tensor, new: Tensor) -> Any:
    """Return a batch that has `new` in the place of its `images`."""
    return map_tensors(lambda tensor: new if tensor is images else tensor, batch)


def of_channels(values: list[float], images: Tensor, name: str) -> Tensor:
    """Return a value for each channel of images (M, C, H, W), so that it can be computed with them: (C, 1, 1).

    Raises:
        ApartError: where there are as many values as neither 1 nor the channels.
    """
    channels = images.shape[1]
    if len(values) not in (1, channels):
        raise ApartError(
            f"images {tuple(images.shape)} have {channels} channels, and {name} has {len(values)} values; pass mean= "
            "and std= with one value, or one for each channel."
        )
    return torch.tensor(values, dtype=images.dtype).to(images.device).view(-1, 1, 1)
