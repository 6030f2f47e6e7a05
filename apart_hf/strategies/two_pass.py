"""The one scheme behind all methods (Eq. 2): a clean pass, an ascent, a perturbed pass (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf.batchnorm.layouts import is_channels_last
from apart_hf.batchnorm.patching import kept_buffers, untracked_statistics
from apart_hf.errors import ApartError
from apart_hf.strategies.hyper_parameters import HasBackward

if TYPE_CHECKING:
    from apart_hf.strategies.methods import Method


class TwoPassStrategy:
    """Algorithm 1 for any list of perturbations; made by `create_strategy`."""

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
        """Cost of a step with its second pass, see `Method.passes`."""
        return self.method.passes(self.ratio)

    def second_pass_size(self, samples: int) -> int:
        """N for a batch of M `samples`, checked against every perturbation's needs."""
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
        """Add this batch's gradient to `p.grad` of every trainable parameter, as `backward()` does.

        Args:
            images: (M, ...) the batch.
            targets: (M, ...) class indices, or soft labels.
            criterion: criterion(output, targets) -> scalar loss, the *mean* over the samples.
            backward: replaces `loss.backward()`, for instance `lambda loss: scaler.scale(loss).backward()`.
            perturb: False: a plain step in a single pass.

        Returns: (loss, output) of the clean pass, detached.

        Raises: ApartError where the batch does not fit the hyper-parameters (also by a group with one value per channel
            in a layer), the model or all that is perturbed in it is in eval mode, or a layer's forward is replaced
            already.
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
        with self._isolated_gradients(), self._no_sync(), ExitStack() as observed:
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
        return loss.detach(), _detached(output)

    def _draw(self, images: Tensor, targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """S of Algorithm 1, lines 6 and 7: the whole batch in its order, or the first N of a random permutation.

        Then in the order that a perturbation computes fastest in; the order has no effect on the gradient.
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

    @contextmanager
    def _isolated_gradients(self) -> Iterator[None]:
        """Within the block p.grad starts from nothing; at its end, what was there before is added again.

        Only where a perturbation reads p.grad. In place, so that gradients that are views (DDP's buckets) stay views.
        """
        earlier = []
        if self._isolates:
            present = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
            earlier = [(p, gradient.clone()) for p, gradient in present]
            for _, gradient in present:
                gradient.zero_()
        try:
            yield
        finally:
            for p, before in earlier:
                if p.grad is None:
                    p.grad = before
                else:
                    p.grad.add_(before)

    def _no_sync(self) -> AbstractContextManager:
        """DDP reduces the sum of both passes' gradients, once, in the second backward."""
        no_sync = getattr(self.model, "no_sync", None)
        return no_sync() if no_sync is not None else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """What must be kept between steps to go on exactly: the state of the generator, where one was given."""
        return {} if self.generator is None else {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if ("generator" in state) != (self.generator is not None):
            has, lacks = ("state", "strategy") if "generator" in state else ("strategy", "state")
            raise ApartError(f"the {has} has a generator, the {lacks} has none; pass generator= as when it was saved.")
        if self.generator is not None:
            self.generator.set_state(state["generator"])


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, (tuple, list)):
        items = [_detached(item) for item in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if isinstance(output, Mapping):
        return {key: _detached(value) for key, value in output.items()}
    return output
