"""How the gradients of the two passes become the one that the optimizer is given (the weights of R and L in Eq. 2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apart_hf.strategies.ddp import find_ddp, within_forward
from apart_hf.strategies.flat import flat_copy, pieces, safe_ratio
from apart_hf.strategies.gradients import handed_on, isolated_gradients, scaled_gradients, unsynchronised
from apart_hf.strategies.scalars import checked_radius

if TYPE_CHECKING:
    from apart_hf.strategies.fitting import Plan


class MeanBySamples:
    """Takes M/(M+N) of the clean and N/(M+N) of the perturbed gradient (Algorithm 1, line 12).

    It is the base of the others. A backward adds to p.grad, so that a combination is what happens around backwards.

    Args:
        model: the network, possibly wrapped.
        **hyper: the hyper-parameters that `defaults` names.
    """

    #: Hyper-parameters with their defaults.
    defaults: ClassVar[dict[str, Any]] = {}
    #: False where the clean gradient is not a part of the sum: p.grad must then hold it alone, until it is set aside.
    keeps_clean_gradient: ClassVar[bool] = True

    def __init__(self, model: nn.Module, **hyper: Any):
        self.model = model
        self._stays: set[nn.Parameter] = set()
        self._dropped: list[nn.Parameter] = []

    def weights(self, plan: Plan) -> tuple[float, float]:
        """Return the weights of the clean and of the perturbed loss, for a plan of the second pass."""
        return plan.weights

    def within_one_pass(self, parameters: Iterable[Tensor], weight: float | Tensor) -> AbstractContextManager[None]:
        """Open the backward of a pass whose loss has a weight, for parameters that the other pass does not reach."""
        return nullcontext()

    @contextmanager
    def combining(self) -> Iterator[None]:
        """Open both passes; at the end, p.grad holds what it held before and the combined gradient."""
        yield

    def set_aside(self) -> Tensor | float:
        """Take the clean gradient out of p.grad once the ascent has read it.

        Returns:
            A factor of the perturbed loss: 1, or what is not finite where the clean gradient that was taken was not, so
            that a gradient scaler sees it in what is left.
        """
        return 1.0


class Balanced(MeanBySamples):
    """Counts each sample once, as Fast AdvProp does (Mei et al. 2022, "Re-balancing training samples").

    Samples of the second pass are seen twice, and count half each time: 1 - N/2M for the clean gradient, in expectation
    over which samples they are, and N/2M for the perturbed one.
    """

    def weights(self, plan: Plan) -> tuple[float, float]:
        perturbed = plan.size / (2 * plan.samples)
        return 1 - perturbed, perturbed

    def within_one_pass(self, parameters: Iterable[Tensor], weight: float | Tensor) -> AbstractContextManager[None]:
        """Let them have that pass's gradient whole ("Synchronizing parameter updating speed")."""
        return scaled_gradients(parameters, 1 / weight)


class PerturbedAlone(MeanBySamples):
    """Takes the perturbed gradient alone (R = 0 in Eq. 2, as in SAM)."""

    keeps_clean_gradient = False

    def weights(self, plan: Plan) -> tuple[float, float]:
        return 1.0, 1.0

    @contextmanager
    def combining(self) -> Iterator[None]:
        # in place where there is a gradient already: DDP's are views of its buckets
        self._stays = {p for p in self.model.parameters() if p.grad is not None}
        self._dropped = []
        yield
        for p in self._dropped:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    @torch.no_grad()
    def set_aside(self) -> Tensor | float:
        gradients = self._clean()
        if not gradients:
            return 1.0
        torch._foreach_mul_(gradients, 0.0)
        visible = 1.0 + torch.stack(torch._foreach_norm(gradients)).sum()
        self._dropped = [p for p in self.model.parameters() if p.grad is not None and p not in self._stays]
        for p in self._dropped:
            p.grad = None  # the second backward then gives its own, and need not add it
        return visible

    def _clean(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]


class SurrogateGap(PerturbedAlone):
    """Takes g_p - alpha * (g - <g, u> u) with u = g_p / ||g_p||, the clean g and the perturbed g_p (GSAM).

    The part of g that is orthogonal to g_p lowers the surrogate gap h = f_p - f where it is climbed, and leaves f_p
    (Zhuang et al. 2022, Algorithm 1, steps 3 and 4). Products and norms are over all parameters at once. With several
    processes, each takes its own two gradients apart, and the results are averaged, as in the authors' code. A gradient
    that the clean pass does not give counts as zero there. Parameters outside of the model, such as a criterion's, have
    the perturbed gradient alone. Two copies of the gradients are held, the second while they are combined.

    Args:
        model: the network, possibly wrapped.
        alpha: share of the orthogonal part, >= 0; 0 is SAM.

    Raises:
        ApartError: where DistributedDataParallel wraps a part of the model.
    """

    defaults: ClassVar = {"alpha": 0.01}

    def __init__(self, model: nn.Module, *, alpha: float):
        super().__init__(model)
        self.alpha = checked_radius("alpha", alpha, "GSAM's paper uses 0.005 to 1", what="share of the orthogonal part")
        self._ddp = find_ddp(model, warns=False)
        self._clean_gradient: tuple[list[nn.Parameter], Tensor] | None = None

    @contextmanager
    def combining(self) -> Iterator[None]:
        shares = self._ddp is not None and self._ddp.require_backward_grad_sync
        combined: list[tuple[Tensor, Tensor]] = []
        with isolated_gradients(self.model), unsynchronised(self.model), super().combining():
            try:
                yield
                self._combine()
                if shares:
                    combined = self._taken()
            finally:
                self._clean_gradient = None
        if combined:  # by a backward of their own, in which DDP's hooks reduce them with what was there
            zero = combined[0][1].new_zeros(())
            within_forward(cast(DistributedDataParallel, self._ddp), lambda: handed_on(zero, combined)).backward()

    @torch.no_grad()
    def set_aside(self) -> Tensor | float:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if parameters:
            self._clean_gradient = parameters, flat_copy(self._clean(), parameters)[0]
        return super().set_aside()

    @torch.no_grad()
    def _combine(self) -> None:
        if self._clean_gradient is None:
            return
        parameters, clean = self._clean_gradient
        known = dict(zip(parameters, pieces(clean, parameters)))
        every = [p for p in self.model.parameters() if p.grad is not None or p in known]
        for p in every:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if len(every) > len(parameters):  # what the second pass alone has used
            clean, _ = flat_copy([known.get(p, torch.zeros_like(p)) for p in every], every)
        gradients = [p.grad for p in every if p.grad is not None]
        perturbed, _ = flat_copy(gradients, every)
        if clean.dtype.itemsize < 4:
            clean, perturbed = clean.float(), perturbed.float()
        direction = perturbed.mul_(safe_ratio(1.0, torch.linalg.vector_norm(perturbed)))
        clean.addcmul_(direction, clean.dot(direction), value=-1.0)
        torch._foreach_add_(gradients, pieces(clean, every), alpha=-self.alpha)

    def _taken(self) -> list[tuple[Tensor, Tensor]]:
        """Take the gradients out of p.grad."""
        self._dropped = []
        found: list[tuple[Tensor, Tensor]] = []
        for p in self.model.parameters():
            if p.grad is None:
                continue
            if p in self._stays:
                found.append((p, p.grad.clone()))
                p.grad.zero_()
            else:
                found.append((p, p.grad))
                p.grad = None
        return found
