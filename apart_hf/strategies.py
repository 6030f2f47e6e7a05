"""Strategies fill `p.grad` for one batch. All of them are one scheme, model-based adversarial training (Eq. 2):

a clean pass, each perturbation's ascent, a perturbed pass, and a weighted sum of the two gradients (Algorithm 1). A
method is a name for a list of perturbations and for whether the clean gradient is kept; see `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf.bn_kernels import is_channels_last
from apart_hf.errors import ApartError, unknown_name
from apart_hf.perturbations import (
    AdaptiveWeights,
    AdversarialStatistics,
    GroupStatistics,
    NormalisationWeights,
    Perturbation,
    RandomStatistics,
    Weights,
)
from apart_hf.perturbed_bn import kept_buffers, untracked_statistics


@dataclass(frozen=True)
class Method:
    """A named point of the scheme.

    Args:
        summary: one line for `--help` and the docs.
        perturbations: what is moved before the second pass; none: a plain step.
        keeps_clean_gradient: True: M/(M+N) of the clean and N/(M+N) of the perturbed gradient (Algorithm 1, line 12).
            False: the perturbed gradient alone (R = 0 in Eq. 2, as in SAM).
        defaults: hyper-parameters that differ from the perturbations' own defaults.
    """

    summary: str
    perturbations: tuple[type[Perturbation], ...] = ()
    keeps_clean_gradient: bool = True
    defaults: dict[str, Any] = field(default_factory=dict)

    def hyper_parameters(self) -> dict[str, Any]:
        """Every hyper-parameter of the method with its default: numbers, then options."""
        found = {name: value for p in self.perturbations for name, value in p.defaults.items()}
        if self.perturbations and self.keeps_clean_gradient:
            found["ratio"] = 1.0
        found |= self.defaults
        return dict(sorted(found.items(), key=lambda item: isinstance(item[1], bool)))

    def passes(self, ratio: float = 1.0, every: int = 1) -> float:
        """Mean cost of a step in passes over the batch: 1 for a plain step, 1 + ratio for one with a second pass."""
        return 1 + ratio / every if self.perturbations else 1.0


METHODS: dict[str, Method] = {
    "standard": Method("one ordinary pass"),
    "apart": Method("perturbed BN statistics (Algorithm 1)", (AdversarialStatistics,)),
    "sam": Method("perturbed weights (Foret et al. 2021)", (Weights,), keeps_clean_gradient=False),
    "apart-sam": Method("both at once (Section 3.3)", (AdversarialStatistics, Weights), defaults={"rho": 0.2}),
    "asam": Method(
        "weights perturbed in proportion to their size (Kwon et al. 2021)", (AdaptiveWeights,),
        keeps_clean_gradient=False,
    ),
    "apart-asam": Method("apart and asam at once", (AdversarialStatistics, AdaptiveWeights)),
    "sam-on": Method(
        "weights of normalisation layers perturbed (Mueller et al. 2023)", (NormalisationWeights,),
        keeps_clean_gradient=False,
    ),
    "random-bn": Method("apart with random signs", (RandomStatistics,)),
    "ghost-bn": Method("apart with groups only, epsilon 0", (GroupStatistics,)),
}


def list_strategies() -> list[str]:
    """The names that `create_strategy` takes."""
    return list(METHODS)


def create_strategy(
    name: str, model: nn.Module, *, accelerator=None, generator: torch.Generator | None = None,
    autocast: Callable[[], AbstractContextManager] | None = None, **hyper: Any,
) -> TwoPassStrategy:
    """Make the strategy `name` for `model`.

    Args:
        name: one of `list_strategies()`.
        model: the network; may be wrapped (DDP, compiled). After `accelerator.prepare`, where that is used.
        accelerator: an `accelerate.Accelerator`; its `backward` is then the default backward.
        generator: draws the samples of the second pass where ratio < 1, and random-bn's signs. None: torch's global
            generator.
        autocast: makes the context of the two forwards and their losses; the backwards stay outside of it.
        **hyper: the method's hyper-parameters (`METHODS[name].hyper_parameters()`): epsilon, groups, ratio, rho, ...

    Raises: ApartError (a ValueError) for an unknown method or hyper-parameter, a value out of range, or a model that
        the method does not take: without the layers that it perturbs, with a BN class that has a forward of its own,
        or sharded.
    """
    known = check_hyper_parameters(name, hyper)
    _refuse_sharded(model)
    method = METHODS[name]
    return TwoPassStrategy(
        name, method, model, known | hyper, accelerator=accelerator, generator=generator, autocast=autocast
    )


def check_hyper_parameters(name: str, hyper: Iterable[str]) -> dict[str, Any]:
    """The hyper-parameters of the method `name` with their defaults.

    Raises: ApartError where there is no such method, or it lacks one that is named in `hyper`.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    known = METHODS[name].hyper_parameters()
    for key in hyper:
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ApartError(f"method {name!r} has no hyper-parameter {key!r}; {has}.")
    return known


def _refuse_sharded(model: nn.Module) -> None:
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine", "PipelineEngine"):
                raise ApartError(
                    f"the model is sharded ({kind.__name__}), and the second pass needs whole weights and gradients on "
                    "each process; use DistributedDataParallel."
                )


class TwoPassStrategy:
    """Algorithm 1 for any list of perturbations; made by `create_strategy`."""

    def __init__(self, name, method, model, hyper, *, accelerator=None, generator=None, autocast=None):
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
        self._autocast = autocast or nullcontext
        self._backward = accelerator.backward if accelerator is not None else Tensor.backward
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
        self, images: Tensor, targets: Tensor, criterion: Callable[[Any, Tensor], Tensor], *,
        backward: Callable[[Tensor], Any] | None = None, perturb: bool = True,
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

    def _pass(self, images, targets, criterion, backward, weight: float = 1.0) -> tuple[Tensor, Any]:
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
            earlier = [(p, p.grad.clone()) for p in self.model.parameters() if p.grad is not None]
            for p, _ in earlier:
                p.grad.zero_()
        try:
            yield
        finally:
            for p, gradient in earlier:
                p.grad.add_(gradient)

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
