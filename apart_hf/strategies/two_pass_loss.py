"""The two passes as a loss: they run when it is computed, and its `backward` hands their gradients on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from apart_hf.errors import ApartError
from apart_hf.strategies.autocast import AmbientAutocast
from apart_hf.strategies.batches import detached
from apart_hf.strategies.checks import check_criterion, check_loss, check_model, split_result
from apart_hf.strategies.create import create_strategy
from apart_hf.strategies.ddp import find_ddp, runs_within, within_forward
from apart_hf.strategies.fitting import Plan
from apart_hf.strategies.gradients import handed_on
from apart_hf.strategies.hyper_parameters import MethodName, Uneven
from apart_hf.strategies.inner_backward import InnerBackward
from apart_hf.strategies.machine import averaged, processes
from apart_hf.strategies.methods import check_hyper_parameters, chosen_method
from apart_hf.strategies.perturbation import Perturbation
from apart_hf.strategies.wrapping import WrappingCheck

Batch = TypeVar("Batch")
Result = TypeVar("Result")


_ELSEWHERE = {
    "accelerator": "call accelerator.backward(loss), and give the call ends_step=accelerator.sync_gradients",
    "autocast": "both passes take the autocast that is around the call",
    "backward": "call loss.backward(), or what the loop has in its place",
    "samples": "give it to the call: compute_loss(batch, samples=N)",
}


def check_options(name: str, hyper: Iterable[str], elsewhere: Mapping[str, str] = _ELSEWHERE) -> None:
    """Refuse what a strategy takes and a loss has no use for, and what is no hyper-parameter.

    Args:
        name: of the method.
        hyper: names of options.
        elsewhere: what to do instead, by such names.

    Raises:
        ApartError: for an unknown method, too.
    """
    check_elsewhere(hyper, elsewhere)
    check_hyper_parameters(name, hyper)


def check_elsewhere(hyper: Iterable[str], elsewhere: Mapping[str, str] = _ELSEWHERE) -> None:
    """Refuse what a strategy takes and a loss has no use for, see `check_options`."""
    for key in hyper:
        if key in elsewhere:
            raise ApartError(f"{key}= is not taken here: {elsewhere[key]}.")


class TwoPassLoss(Generic[Batch, Result]):
    """Makes both passes as a loss, for loops that own the backward. `create_loss` makes it.

    Args:
        name, keeps_clean_gradient, generator, every, uneven, hyper, mean, std: see `create_loss`.
        model: the network, possibly wrapped.
        loss_fn: loss_fn(model, batch) -> loss, or (loss, aux).

    Attributes:
        strategy: has the hyper-parameters, and counts the steps.

    Example:
        >>> import timm, torch
        >>> from apart_hf import create_loss
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> def loss_fn(model, batch):
        ...     return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> create_loss("apart", model, loss_fn, groups=4, every=2).strategy
        apart(epsilon=0.1, groups=4, ratio=1.0, every=2)
    """

    def __init__(
        self,
        name: str | Sequence[str | Perturbation],
        model: nn.Module,
        loss_fn: Callable[[Any, Batch], Result],
        *,
        keeps_clean_gradient: bool | None,
        generator: torch.Generator | None,
        every: int,
        uneven: Uneven,
        hyper: dict[str, Any],
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ):
        check_elsewhere(hyper)
        _, method = chosen_method(name, model, hyper, keeps_clean_gradient)
        check_model(model)
        if not callable(loss_fn) or isinstance(loss_fn, nn.modules.loss._Loss):
            raise ApartError(
                f"loss_fn is an object of type {type(loss_fn).__name__}, and is to be a function of model and batch: "
                "lambda model, batch: criterion(model(batch[0]), batch[1])."
            )
        if method.perturbations:
            check_criterion(loss_fn)
        self.model, self.loss_fn = model, loss_fn
        self._ddp = find_ddp(model)
        network = model if self._ddp is None else self._ddp.module
        self._autocast = AmbientAutocast(network)
        options: dict[str, Any] = {"generator": generator, "every": every, "uneven": uneven, "mean": mean, "std": std}
        options |= hyper if keeps_clean_gradient is None else {**hyper, "keeps_clean_gradient": keeps_clean_gradient}
        self.strategy = create_strategy(cast(MethodName, name), network, autocast=self._autocast.again, **options)
        self._backward, self._wrapping = InnerBackward(network), WrappingCheck(model)

    def __call__(
        self, batch: Batch, *, samples: int | None = None, perturb: bool = True, ends_step: bool = True
    ) -> Result:
        """Compute the loss of a batch, and the gradient that its `backward` adds to p.grad.

        In eval mode and under torch.no_grad this is `loss_fn(model, batch)`.

        Args:
            batch: see `TwoPassStrategy.accumulate`, as for `samples` and `perturb`.
            samples: in the batch; None: it tells.
            perturb: False: a plain loss.
            ends_step: whether the optimizer steps after this batch, for `every`.

        Returns:
            The loss of the clean pass, or (loss, aux) where loss_fn returns that; aux is detached.

        Raises:
            ApartError: as `TwoPassStrategy.accumulate` does.
        """
        if not runs_within():
            self._wrapping()
        network = self.strategy.model
        trains = network.training and torch.is_grad_enabled()
        plan = self.strategy.plan(batch, samples, strict=samples is None, perturb=perturb) if trains else None
        kind: type = Tensor
        aux: Any = None

        def loss_fn(part: Any) -> Result:
            nonlocal kind
            result = self.loss_fn(network, part)
            kind = type(result)
            return result

        def compute() -> Tensor:
            nonlocal aux
            if plan is not None:
                loss, aux = self._two_passes(batch, loss_fn, plan)
                return loss
            loss, aux = split_result(loss_fn(batch))
            if trains:
                loss, aux = check_loss(loss), detached(aux)
            return loss

        loss = compute() if self._ddp is None else within_forward(self._ddp, compute)
        self.strategy.steps += int(trains and ends_step)
        if not issubclass(kind, tuple):
            return cast(Result, loss)
        return cast(Result, kind._make((loss, aux)) if hasattr(kind, "_make") else (loss, aux))

    def _two_passes(self, batch: Any, loss_fn: Callable[[Any], Any], plan: Plan) -> tuple[Tensor, Any]:
        backward = self._backward
        with self._autocast.aside(), backward.collecting():
            backward.is_half = self._autocast.is_half
            loss, aux = self.strategy.two_passes(batch, loss_fn, backward, plan)
            found = dict(backward.collected())
            held = [p for p in self.strategy.parameters() if p.requires_grad]
            if self._ddp is not None and held and processes() > 1:
                found |= zip(held, averaged([found.get(p, torch.zeros_like(p)) for p in held]))
        return handed_on(loss, list(found.items())), aux

    def set(self, **changes: Any) -> None:
        """Change hyper-parameters between two steps, see `TwoPassStrategy.set`.

        Args:
            **changes: hyper-parameters of the method, `every` or `uneven`.

        Raises:
            ApartError: where one is unknown or out of its range.

        Example:
            >>> import timm, torch
            >>> from apart_hf import create_loss
            >>> model = timm.create_model("test_resnet", num_classes=10)
            >>> compute_loss = create_loss("sam", model, lambda model, batch: model(batch).logsumexp(1).mean())
            >>> compute_loss.set(rho=0.1)
            >>> compute_loss.strategy
            sam(rho=0.1)
        """
        self.strategy.set(**changes)

    def state_dict(self) -> dict[str, Any]:
        """Return what must be kept between steps to go on exactly.

        Returns:
            That of the strategy and, where activations were float16, their scale.

        Example:
            >>> import timm, torch
            >>> from apart_hf import create_loss
            >>> model = timm.create_model("test_resnet", num_classes=10)
            >>> create_loss("sam", model, lambda model, batch: model(batch).logsumexp(1).mean()).state_dict()["hyper"]
            {'rho': 0.05, 'global_norm': False}
        """
        return self.strategy.state_dict() | self._backward.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned.

        Args:
            state: that of a loss, or of a strategy, of the same method.

        Raises:
            ApartError: as `TwoPassStrategy.load_state_dict` does.

        Example:
            >>> import timm, torch
            >>> from apart_hf import create_loss
            >>> model = timm.create_model("test_resnet", num_classes=10)
            >>> one, other = (create_loss("sam", model, lambda model, batch: model(batch).mean()) for _ in range(2))
            >>> one.set(rho=0.3)
            >>> other.load_state_dict(one.state_dict())
            >>> other.strategy
            sam(rho=0.3)
        """
        self.strategy.load_state_dict(state)
        self._backward.load_state_dict(state)

    def go_on_from(self, other: TwoPassLoss[Any, Any]) -> None:
        """Go on from where another loss of the same method and values is, whose model is now wrapped in another way.

        Args:
            other: whose place this one takes.

        Raises:
            ApartError: as `load_state_dict` does.

        Example:
            >>> import timm, torch
            >>> from apart_hf import create_loss
            >>> model = timm.create_model("test_resnet", num_classes=10)
            >>> one = create_loss("sam", model, lambda model, batch: model(batch).mean())
            >>> one.set(rho=0.3)
            >>> other = create_loss("sam", torch.compile(model), lambda model, batch: model(batch).mean())
            >>> other.go_on_from(one)
            >>> other.strategy
            sam(rho=0.3)
        """
        self.strategy.take_over(other.strategy)
        self._backward.load_state_dict(other.state_dict())
