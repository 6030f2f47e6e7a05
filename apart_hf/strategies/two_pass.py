"""The one scheme behind all methods (Eq. 2): a clean pass, an ascent, a perturbed pass (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf.batchnorm.layouts import is_channels_last
from apart_hf.batchnorm.patching import kept_buffers, untracked_statistics
from apart_hf.errors import ApartError
from apart_hf.strategies.gradients import detached, isolated_gradients, unsynchronised
from apart_hf.strategies.hyper_parameters import HasBackward

if TYPE_CHECKING:
    from apart_hf.strategies.methods import Method


class TwoPassStrategy:
    """Algorithm 1 for any list of perturbations: what a training loop calls in the place of `loss.backward()`.

    It is made by `create_strategy`. Between two calls the model is what it was before: the same modules, parameters,
    buffers and keys.

    Args:
        name: of the method, for messages.
        method: what it combines.
        model: the network, possibly wrapped.
        hyper: every hyper-parameter of the method.
        accelerator: see `create_strategy`, as for `generator` and `autocast`.

    Attributes:
        perturbations: one `Perturbation` for each class that the method names.
        hyper: the hyper-parameters in use.
        ratio: N/M, the share of the batch in the second pass.

    Example:
        >>> import timm
        >>> from apart_hf import create_strategy
        >>> strategy = create_strategy("apart-sam", timm.create_model("test_resnet"), groups=4)
        >>> strategy.name, strategy.hyper["rho"], len(strategy.perturbations)
        ('apart-sam', 0.2, 2)
    """

    def __init__(
        self,
        name: str,
        method: Method,
        model: nn.Module,
        hyper: dict[str, Any],
        *,
        accelerator: HasBackward | None = None,
        generator: torch.Generator | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    ):
        self.name, self.method, self.model, self.hyper = name, method, model, hyper
        self.generator = generator
        self.ratio = hyper.get("ratio", 1.0)
        if not (isinstance(self.ratio, (int, float)) and 0 < self.ratio <= 1):
            raise ApartError(f"ratio={self.ratio!r}: N/M, the share of the batch in the second pass, is in (0, 1].")
        self.perturbations = [
            kind(model, **{key: hyper[key] for key in kind.defaults}) for kind in method.perturbations
        ]
        self._batchnorms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
        self._others = [m for m in model.modules() if m._buffers and not isinstance(m, _BatchNorm)]
        self._autocast: Callable[[], AbstractContextManager[Any]] = autocast or nullcontext
        self._backward: Callable[[Tensor], Any] = accelerator.backward if accelerator is not None else Tensor.backward
        self._isolates = any(p.reads_weight_gradients for p in self.perturbations)

    def __repr__(self) -> str:
        shown = (f"{key}={value}" for key, value in self.hyper.items() if value is not False)
        return f"{self.name}({', '.join(shown)})"

    @property
    def passes(self) -> float:
        """Tell the cost of a step with its second pass, in passes over the batch (see `Method.passes`).

        Example:
            >>> import timm
            >>> from apart_hf import create_strategy
            >>> create_strategy("apart", timm.create_model("test_resnet"), ratio=0.5).passes
            1.5
        """
        return self.method.passes(self.ratio)

    def second_pass_size(self, samples: int) -> int:
        """Count the samples of the second pass, and check them against the needs of every perturbation.

        Args:
            samples: M, the samples of a batch.

        Returns:
            N = ratio * M.

        Raises:
            ApartError: where N is not a whole number, or a perturbation does not take it (`groups` must divide it).

        Example:
            >>> import timm
            >>> from apart_hf import create_strategy
            >>> strategy = create_strategy("apart", timm.create_model("test_resnet"), groups=4, ratio=0.5)
            >>> strategy.second_pass_size(16)
            8
        """
        size = round(self.ratio * samples)
        if abs(size - self.ratio * samples) > 1e-4 or size < 1:  # a ratio may come rounded from a command line
            raise ApartError(
                f"ratio={self.ratio} of a batch of {samples} is {self.ratio * samples:g} samples, not a whole number; "
                f"choose a ratio k/{samples}, for instance {max(size, 1)}/{samples} = {max(size, 1) / samples!r}."
            )
        for perturbation in self.perturbations:
            perturbation.check(size)
        return size

    def accumulate_gradients(
        self,
        images: Tensor,
        targets: Tensor,
        criterion: Callable[[Any, Tensor], Tensor],
        *,
        backward: Callable[[Tensor], Any] | None = None,
        perturb: bool = True,
    ) -> tuple[Tensor, Any]:
        """Add this batch's gradient to `p.grad` of every trainable parameter, as `backward()` does (Algorithm 1).

        Args:
            images: (M, ...) the batch.
            targets: (M, ...) class indices, or soft labels.
            criterion: criterion(output, targets) -> scalar loss, the *mean* over the samples.
            backward: replaces `loss.backward()`, for instance `lambda loss: scaler.scale(loss).backward()`.
            perturb: False: a plain step in a single pass.

        Returns:
            (loss, output) of the clean pass, detached: a scalar, and what the model returns, usually logits (M, C).

        Raises:
            ApartError: where the batch does not fit the hyper-parameters (also by a group with one value per channel in
                a layer), the model or all that is perturbed in it is in eval mode, or a layer's forward is replaced
                already.

        Example:
            >>> import timm, torch
            >>> from apart_hf import create_strategy
            >>> model = timm.create_model("test_resnet", num_classes=10)
            >>> strategy = create_strategy("apart", model, groups=4)
            >>> images, targets = torch.randn(8, 3, 32, 32), torch.arange(8)
            >>> loss, logits = strategy.accumulate_gradients(images, targets, torch.nn.CrossEntropyLoss())
            >>> loss.shape, logits.shape
            (torch.Size([]), torch.Size([8, 10]))
            >>> all(p.grad is not None for p in model.parameters())
            True
        """
        backward = backward or self._backward
        if not self.model.training:
            raise ApartError("the model is in eval mode; call model.train() before accumulate_gradients.")
        if not (perturb and self.perturbations):
            return self._pass(images, targets, criterion, backward)
        samples, drawn = len(images), self.second_pass_size(len(images))
        keeps = self.method.keeps_clean_gradient
        clean_weight, perturbed_weight = samples / (samples + drawn), drawn / (samples + drawn)

        others = [(b, b._version) for m in self._others for b in m.buffers(recurse=False)]
        isolated = isolated_gradients(self.model) if self._isolates else nullcontext()
        with isolated, unsynchronised(self.model), ExitStack() as observed:
            for perturbation in self.perturbations:
                observed.enter_context(perturbation.observed(samples))
            loss, output = self._pass(images, targets, criterion, backward, clean_weight if keeps else 1.0)
            for perturbation in self.perturbations:
                perturbation.ascend(self.generator)
            if not keeps:
                # times zero rather than dropped: a non-finite gradient stays visible to GradScaler
                torch._foreach_mul_([p.grad for p in self.model.parameters() if p.grad is not None], 0.0)

        images, targets = self._draw(images, targets, drawn)
        with untracked_statistics(self._batchnorms), kept_buffers(others), ExitStack() as applied:
            for perturbation in self.perturbations:
                applied.enter_context(perturbation.applied(drawn))
            self._pass(images, targets, criterion, backward, perturbed_weight if keeps else 1.0)
        return loss, output

    def _pass(
        self,
        images: Tensor,
        targets: Tensor,
        criterion: Callable[[Any, Tensor], Tensor],
        backward: Callable[[Tensor], Any],
        weight: float = 1.0,
    ) -> tuple[Tensor, Any]:
        with self._autocast():
            output = self.model(images)
            loss = criterion(output, targets)
        backward(loss if weight == 1.0 else loss * weight)
        return loss.detach(), detached(output)

    def _draw(self, images: Tensor, targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Draw S of Algorithm 1, lines 6 and 7: the whole batch in its order, or the first N of a random permutation.

        It is then put in the order that a perturbation computes fastest in, which has no effect on the gradient.
        """
        chosen = None
        if size < len(images):
            chosen = torch.randperm(len(images), generator=self.generator)[:size]
        for perturbation in self.perturbations:
            order = perturbation.order(size)
            if order is not None:
                chosen = order if chosen is None else chosen[order]
        if chosen is None:
            return images, targets
        chosen = chosen.to(images.device)
        subset = images.index_select(0, chosen)
        if is_channels_last(images):
            subset = subset.contiguous(memory_format=torch.channels_last)
        return subset, targets.index_select(0, chosen)

    def state_dict(self) -> dict[str, Any]:
        """Return what must be kept between steps to go on exactly.

        Returns:
            The state of the generator, under the key "generator", where one was given; else nothing.

        Example:
            >>> import timm, torch
            >>> from apart_hf import create_strategy
            >>> model, generator = timm.create_model("test_resnet"), torch.Generator().manual_seed(0)
            >>> list(create_strategy("apart", model, generator=generator).state_dict())
            ['generator']
        """
        return {} if self.generator is None else {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned.

        Args:
            state: that of a strategy of the same method.

        Raises:
            ApartError: where one of the two has a generator, and the other has none.

        Example:
            >>> import timm, torch
            >>> from apart_hf import create_strategy
            >>> model = timm.create_model("test_resnet")
            >>> one = create_strategy("random-bn", model, generator=torch.Generator().manual_seed(0))
            >>> other = create_strategy("random-bn", model, generator=torch.Generator())
            >>> other.load_state_dict(one.state_dict())
            >>> torch.equal(one.generator.get_state(), other.generator.get_state())
            True
        """
        if ("generator" in state) != (self.generator is not None):
            has, lacks = ("state", "strategy") if "generator" in state else ("strategy", "state")
            raise ApartError(f"the {has} has a generator, the {lacks} has none; pass generator= as when it was saved.")
        if self.generator is not None:
            self.generator.set_state(state["generator"])
