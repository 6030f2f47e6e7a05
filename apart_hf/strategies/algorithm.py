"""The one scheme behind all methods (Eq. 2): a clean pass, an ascent, a perturbed pass (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf.batchnorm.patching import TooFewValues, kept_buffers, untracked_statistics
from apart_hf.errors import ApartError, written
from apart_hf.strategies.auxiliary_batchnorm import check_statistics, check_trained, in_use_of
from apart_hf.strategies.batches import detached, map_tensors
from apart_hf.strategies.checks import check_loss, split_result
from apart_hf.strategies.fitting import Notice, Plan, changed, fitted
from apart_hf.strategies.gradients import isolated_gradients, silent_for_others, unsynchronised
from apart_hf.strategies.hyper_parameters import Uneven
from apart_hf.strategies.machine import draw_device, processes
from apart_hf.strategies.passes import applied, ascending, further_passes, released, shown
from apart_hf.strategies.sample_count import count_samples, rows_of
from apart_hf.strategies.samples import can_be_sorted, check_rows, select_samples
from apart_hf.strategies.scalars import python_number
from apart_hf.strategies.state import StrategyState

if TYPE_CHECKING:
    from apart_hf.strategies.methods import Method

LossFunction = Callable[[Any], Any]  # loss_fn(batch) -> loss, or (loss, aux)
Backward = Callable[[Tensor], Any]


class Algorithm(StrategyState):
    """Runs Algorithm 1 for any list of perturbations, on one batch and with any backward.

    Args:
        name, method, model, hyper, generator, autocast, every, uneven, mean, std: see `TwoPassStrategy`.

    Attributes:
        perturbed_loss: of the second pass over the latest batch, detached; None: there was none.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        model: nn.Module,
        hyper: dict[str, Any],
        *,
        generator: torch.Generator | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
        every: int = 1,
        uneven: Uneven = "error",
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ):
        kept: dict[str, Any] = {"every": every, "uneven": uneven, "mean": mean, "std": std}
        super().__init__(name, method, model, hyper, generator=generator, **kept)
        self._autocast: Callable[[], AbstractContextManager[Any]] = autocast or nullcontext
        self.perturbed_loss: Tensor | None = None
        self._notice = Notice()
        check_statistics(self.perturbations)
        check_trained(self.perturbations, keeps_clean_gradient=self.combination.keeps_clean_gradient)
        self._isolates = any(p.reads_weight_gradients for p in self.perturbations)

    @property
    def counts_samples(self) -> bool:
        """Tell whether the number of samples has any effect; it has none on SAM's perturbations of weights alone."""
        return self.ratio != 1 or any(p.counts_samples for p in self.perturbations)

    def figures(self) -> dict[str, Tensor]:
        """Return what the latest ascent shows, for a log: scalars by name, on the device.

        Example:
            >>> import timm
            >>> from apart_hf import create_strategy
            >>> create_strategy("apart", timm.create_model("test_resnet")).figures()
            {'zero_deltas': tensor(nan)}
        """
        return {name: value for p in self.perturbations for name, value in p.figures().items()}

    def plan(self, batch: Any, samples: int | None, *, strict: bool, perturb: bool) -> Plan | None:
        """Decide what the next step does with a batch; None: it is a plain one.

        Args:
            batch: of any kind.
            samples: in it; None: it tells.
            strict: every tensor has a row for each sample; False: those of other lengths belong to all samples.
            perturb: whether a second pass may be made.

        Raises:
            ApartError: where the batch is empty, its samples cannot be counted, or they do not fit.
        """
        self.perturbed_loss = None  # of this batch
        samples = python_number(samples)
        if samples == 0 or (samples is None and rows_of(batch) == [0]):
            raise ApartError("the batch has no samples; leave empty batches out.")
        if samples is not None and (not isinstance(samples, int) or isinstance(samples, bool) or samples < 0):
            raise ApartError(f"samples={written(samples)}: the number of samples of the batch is an integer >= 1.")
        if not (perturb and self.perturbations) or (self.steps + 1) % self.every:
            return None
        if not self.counts_samples:
            return Plan(1, 1, [[{} for _ in self.perturbations]])
        plan = self._fitting(count_samples(batch) if samples is None else samples)
        if plan is not None and plan.attempts and plan.size < plan.samples:
            check_rows(batch, plan.samples, strict=strict)
        return plan

    def _fitting(self, samples: int) -> Plan | None:
        """Plan the second pass over a batch of so many samples, as `uneven` says where they do not fit."""
        try:
            if self.uneven != "fit":
                return Plan(samples, self.second_pass_size(samples), [[{} for _ in self.perturbations]])
            size, attempts = fitted(self.ratio, self.perturbations, samples)
            if attempts:
                return Plan(samples, size, attempts)
            reason = f"ratio={self.ratio} leaves no second pass that fits."
        except ApartError as error:
            if self.uneven == "error":
                raise
            reason = str(error)
        self._notice.plain(samples, reason)
        # other processes may await this one between their two passes: then it takes the ordinary one in two halves
        return None if processes() == 1 else Plan(samples, samples, [])

    def one_pass(
        self, batch: Any, loss_fn: LossFunction, backward: Backward, weight: float | Tensor = 1.0
    ) -> tuple[Tensor, Any]:
        """Compute loss and gradient of a batch.

        Args:
            batch, loss_fn, backward: see `TwoPassStrategy.accumulate`.
            weight: of the loss.

        Returns:
            (loss, aux), detached.
        """
        with self._autocast():
            loss, aux = split_result(loss_fn(batch))
        loss = check_loss(loss)
        if isinstance(weight, Tensor):
            weight = weight.to(loss.device)
        backward(loss * weight if isinstance(weight, Tensor) or weight != 1.0 else loss)
        return loss.detach(), detached(aux)

    def two_passes(self, batch: Any, loss_fn: LossFunction, backward: Backward, plan: Plan) -> tuple[Tensor, Any]:
        """Compute loss and gradient of a batch in two passes.

        Args:
            batch, loss_fn, backward: see `TwoPassStrategy.accumulate`.
            plan: of the second pass.

        Returns:
            (loss, aux) of the clean pass, detached.
        """
        combination = self.combination
        keeps = combination.keeps_clean_gradient
        clean_weight, perturbed_weight = combination.weights(plan)
        modules = list(self.model.modules())
        batchnorms = [m for m in modules if isinstance(m, _BatchNorm)]
        others = [m for m in modules if m._buffers and not isinstance(m, _BatchNorm)]
        buffers = [(b, b._version) for m in others for b in m.buffers(recurse=False)]
        isolated = isolated_gradients(self.model) if self._isolates or not keeps else nullcontext()
        with released(self.perturbations), combination.combining():
            with isolated, unsynchronised(self.model), ExitStack() as observed:
                for perturbation in self.perturbations:
                    observed.enter_context(perturbation.observed(plan.samples))
                seen = shown(self.perturbations, batch)
                clean = backward if keeps else silent_for_others(backward, self._own_tensors)
                if plan.attempts:  # else the second pass reaches what this one does
                    observed.enter_context(combination.within_one_pass(in_use_of(self.perturbations), clean_weight))
                result = self.one_pass(seen, loss_fn, clean, clean_weight)
                for perturbation in self.perturbations:
                    perturbation.ascend(self.generator)
                factor = combination.set_aside()
            with untracked_statistics(batchnorms), kept_buffers(buffers):
                self._second_pass(batch, loss_fn, backward, plan, perturbed_weight * factor)
        return result

    def _own_tensors(self) -> set[Tensor]:
        """Collect the model's parameters, and what perturbations hold: deltas are leaves of the graph, too."""
        own: set[Tensor] = set(self.model.parameters())

        def add(tensor: Tensor) -> Tensor:
            own.add(tensor)
            return tensor

        for perturbation in self.perturbations:
            map_tensors(add, {key: value for key, value in vars(perturbation).items() if key != "model"})
        return own

    def _second_pass(
        self, batch: Any, loss_fn: LossFunction, backward: Backward, plan: Plan, weight: float | Tensor
    ) -> None:
        chosen = None
        if plan.size < plan.samples:
            device = draw_device(self.generator, self.model)
            chosen = torch.randperm(plan.samples, generator=self.generator, device=device)[: plan.size]
        ascended = [dict(vars(p)) for p in self.perturbations] if len(plan.attempts) > 1 else []
        # the order of a whole batch is for speed alone
        sorts = chosen is not None or can_be_sorted(batch, plan.samples)
        for attempt in plan.attempts:
            try:
                with changed(self.perturbations, attempt), self._sorting(sorts):
                    part = self._part(batch, chosen, plan)
                    self._climb(part, loss_fn, backward, plan.size)
                    held = in_use_of(self.perturbations).values()
                    with applied(self.perturbations, plan.size), self.combination.within_one_pass(held, weight):
                        seen = shown(self.perturbations, part)
                        self.perturbed_loss, _ = self.one_pass(seen, loss_fn, backward, weight)
            except TooFewValues as error:
                if self.uneven == "error" or (self.uneven == "fit" and attempt is plan.attempts[-1]):
                    raise
                if self.uneven == "plain":
                    self._notice.plain(plan.samples, str(error))
                for perturbation, state in zip(self.perturbations, ascended):
                    vars(perturbation).update(state)
            else:
                self._notice.fitted(plan, attempt, self.ratio * plan.samples)
                return
        self.one_pass(batch, loss_fn, backward, weight)

    def _climb(self, part: Any, loss_fn: LossFunction, backward: Backward, size: int) -> None:
        """Make the further ascents of perturbations that have any, each from the point that all have reached."""
        further = [further_passes(p) for p in self.perturbations]
        for done in range(max(further)):
            climbing = [p for p, passes in zip(self.perturbations, further) if done < passes]
            with ascending(self.model, self.perturbations, size, climbing):
                seen = shown(self.perturbations, part)
                self.one_pass(seen, loss_fn, silent_for_others(backward, self._own_tensors))
                for perturbation in climbing:
                    perturbation.ascend(self.generator)

    def _sorting(self, sorts: bool) -> AbstractContextManager[None]:
        """Let perturbations put samples in an order of theirs within the block, or not."""
        return nullcontext() if sorts else changed(self.perturbations, [{"sorts": False}] * len(self.perturbations))

    def _part(self, batch: Any, chosen: Tensor | None, plan: Plan) -> Any:
        """Take S of Algorithm 1, lines 6 and 7: the whole batch in its order, or those that are `chosen`.

        It is then put in the order that a perturbation computes fastest in, which has no effect on the gradient.
        """
        for perturbation in self.perturbations:
            order = perturbation.order(plan.size)
            if order is not None:
                chosen = order if chosen is None else chosen[order]
        for perturbation in self.perturbations:
            perturbation.select(chosen)
        return batch if chosen is None else select_samples(batch, chosen, plan.samples)
