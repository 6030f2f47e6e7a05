"""Perturbed inputs: the pixels of images, moved by projected gradient descent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apart_hf.errors import ApartError, written
from apart_hf.strategies.machine import draw_device
from apart_hf.strategies.perturbation import Perturbation
from apart_hf.strategies.pixels import find_images, of_channels, pixel_scale, with_images
from apart_hf.strategies.scalars import checked_count, checked_option, python_number


class Inputs(Perturbation):
    """Attacks images by PGD in L-infinity (Madry et al. 2018, Section 2.1), as AdvProp does (Xie et al. 2020).

    delta <- clip(delta + pixel_step * sign(dL/dx)), so often as `steps` says. The clip is to |delta| <= `pixel_epsilon`
    and to valid pixels; a pixel that is not valid before (of random erasing) is not moved further out. Both radii are
    in units of 1/255 of the range of a pixel, whatever the images are normalised by. The paper's values are in its
    Section 5.1.

    Without `random_start`, the first gradient is that of the clean pass, at delta = 0, which makes `steps` - 1 further
    passes. With it, delta begins uniformly within the radius, and each step takes a pass.

    Args:
        model: the network, possibly wrapped.
        pixel_epsilon: radius, in [0, 255].
        pixel_step: of each step, in [0, 255].
        steps: of the ascent, >= 1.
        random_start: begin at a random point within the radius.
        mean, std: what images are normalised by; None: as `model.pretrained_cfg` says.

    Raises:
        ApartError: for a value out of range, and where mean and std are not known.

    Example:
        >>> import timm, torch
        >>> from apart_hf import create_strategy
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> strategy = create_strategy("advprop", model, pixel_epsilon=4, steps=1)
        >>> images, targets = torch.rand(8, 3, 32, 32), torch.arange(8)
        >>> loss, _ = strategy.accumulate_gradients(images, targets, torch.nn.CrossEntropyLoss())
        >>> strategy.figures()  # mean |delta|, in units of 1/255
        {'pixel_delta': tensor(1.)}
    """

    defaults: ClassVar = {"pixel_epsilon": 4.0, "pixel_step": 1.0, "steps": 5, "random_start": False}
    counts_samples = False
    takes_pixel_scale = True

    def __init__(
        self,
        model: nn.Module,
        *,
        pixel_epsilon: float,
        pixel_step: float,
        steps: int,
        random_start: bool,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ):
        self.model = model
        self.pixel_epsilon = _checked_pixels(
            "pixel_epsilon", pixel_epsilon, "the radius", "AdvProp's paper uses 1 to 4"
        )
        self.pixel_step = _checked_pixels("pixel_step", pixel_step, "the size of a step", "AdvProp's paper uses 1")
        self.steps = checked_count("steps", steps, "steps of the ascent")
        self.random_start = checked_option("random_start", random_start)
        self._mean, self._std = pixel_scale(model, mean, std)
        self._rows, self._climbs = 0, False
        self._units: tuple[Any, tuple[Tensor, Tensor, Tensor]] | None = None
        self._images: Tensor | None = None  # of the latest pass
        self._delta: Tensor | None = None
        self._size = torch.tensor(float("nan"))

    @classmethod
    def further_passes(cls, steps: int = 1, random_start: bool = False, **hyper: Any) -> int:
        """Count the passes of the ascent: one a step, but for a first step that climbs the clean pass's gradient."""
        return steps if random_start else steps - 1

    def observed(self, samples: int) -> AbstractContextManager[None]:
        self._rows, self._images, self._delta = samples, None, None
        return nullcontext() if self.random_start else self.climbing(samples)

    @contextmanager
    def climbing(self, samples: int) -> Iterator[None]:
        self._climbs = True
        try:
            yield
        finally:
            self._climbs = False

    def release(self) -> None:
        self._images = self._delta = None

    def shown(self, batch: Any) -> Any:
        images = find_images(batch)
        delta = torch.zeros_like(images) if self._delta is None else self._delta.detach()
        if delta.stride() != images.stride():
            delta = torch.empty_like(images).copy_(delta)
        self._images, self._delta = images.detach(), delta.requires_grad_(self._climbs)
        return with_images(batch, images, images + delta)

    @torch.no_grad()
    def ascend(self, generator: torch.Generator | None = None) -> None:
        images, delta = self._images, self._delta
        if images is None or delta is None:
            raise ApartError("the loss function was not given the images; compute the loss from the batch.")
        unit, black, white = self._in_units_of(images)
        radius = self.pixel_epsilon * unit
        if not delta.requires_grad:  # as the first ascent of a random start finds it
            device = draw_device(generator, self.model)
            noise = torch.rand(images.shape, generator=generator, device=device, dtype=images.dtype)
            delta = (2 * noise.to(images.device) - 1) * radius
        elif delta.grad is None:
            raise ApartError(
                f"the loss does not depend on the images {tuple(images.shape)} of the batch; compute it from the batch "
                "that the loss function is given."
            )
        else:
            # comparisons with NaN, which 0 * inf is, are false: an overflow anywhere gives no sign to any pixel
            counts = delta.grad.abs() > 0 * delta.grad.abs().amax()
            sign = torch.where(counts, delta.grad.sign(), 0.0)
            delta = delta.detach() + self.pixel_step * unit * sign
        lower = torch.maximum(-radius, black - images).clamp(max=0)
        upper = torch.minimum(radius, white - images).clamp(min=0)
        self._delta = torch.minimum(torch.maximum(delta, lower), upper)
        self._size = (self._delta.abs() / unit).mean()

    def _in_units_of(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return 1/255 of a pixel's range, and its two ends, as images have them; made once, so that nothing waits."""
        kind = images.shape[1], images.dtype, images.device
        if self._units is None or self._units[0] != kind:
            unit = of_channels([1 / (255 * std) for std in self._std], images, "std")
            mean = of_channels(self._mean, images, "mean")
            self._units = kind, (unit, -255 * unit * mean, 255 * unit * (1 - mean))
        return self._units[1]

    def select(self, chosen: Tensor | None) -> None:
        delta = self._delta
        if chosen is None or delta is None:
            return
        if len(delta) != self._rows:
            raise ApartError(
                f"the images {tuple(delta.shape)} have {len(delta)} rows for {self._rows} samples, so that those of "
                "the second pass cannot be taken; give them a row for each sample, or use ratio=1."
            )
        self._delta = delta.index_select(0, chosen.to(delta.device))

    def figures(self) -> dict[str, Tensor]:
        """Return the mean size of the latest delta, in units of 1/255."""
        return {"pixel_delta": self._size}


class OneStepInputs(Inputs):
    """Attacks images by one step from the clean pass's own gradient, after Fast AdvProp (Mei et al. 2022).

    Their code makes a pass of its own for that gradient, over the images to attack, with noise and auxiliary BN.

    Args:
        model: the network, possibly wrapped.
        pixel_epsilon, pixel_step: see `Inputs`; of the paper, 1 and 1.
        mean, std: see `Inputs`.
    """

    defaults: ClassVar = {"pixel_epsilon": 1.0, "pixel_step": 1.0}

    def __init__(
        self,
        model: nn.Module,
        *,
        pixel_epsilon: float,
        pixel_step: float,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ):
        super().__init__(
            model, pixel_epsilon=pixel_epsilon, pixel_step=pixel_step, steps=1, random_start=False, mean=mean, std=std
        )


def _checked_pixels(name: str, value: Any, what: str, usual: str) -> float:
    value = python_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 255:
        raise ApartError(f"{name}={written(value)}: {what} in units of 1/255 must be a number in [0, 255] ({usual}).")
    return value
