"""What a strategy keeps between steps: its hyper-parameters, how many steps it has made, and its generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from apart_hf.errors import ApartError, written
from apart_hf.strategies.auxiliary_batchnorm import auxiliary_of, share_parameters
from apart_hf.strategies.fitting import whole_size
from apart_hf.strategies.hyper_parameters import Uneven
from apart_hf.strategies.making import made_combination, made_perturbations, take_over
from apart_hf.strategies.read_only import HyperParameters
from apart_hf.strategies.saved_state import check_state, made_with, say_overridden
from apart_hf.strategies.scalars import python_number, python_numbers

if TYPE_CHECKING:
    from apart_hf.strategies.methods import Method


class StrategyState:
    """Hyper-parameters that are checked whenever they change, and the count of steps that `every` refers to.

    Args:
        name, method, model, hyper, generator, every, uneven, mean, std: see `TwoPassStrategy`.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        model: nn.Module,
        hyper: dict[str, Any],
        *,
        generator: torch.Generator | None = None,
        every: int = 1,
        uneven: Uneven = "error",
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ):
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ApartError(
                f"generator={written(generator)} is of type {type(generator).__name__}; pass a torch.Generator, for "
                "instance torch.Generator().manual_seed(0)."
            )
        self.name, self.method, self.model, self.generator = name, method, model, generator
        hyper, every = python_numbers(hyper), python_number(every)
        self.hyper: dict[str, Any] = HyperParameters(hyper)
        self.every, self.uneven, self.steps = every, uneven, 0
        self._check(hyper, every, uneven)
        self._pixel_scale = {"mean": mean, "std": std}
        self.perturbations = made_perturbations(method.perturbations, model, hyper, self._pixel_scale)
        self.combination = made_combination(method, model, hyper)
        self._made_with = self._in_use()

    def __repr__(self) -> str:
        shown = {key: value for key, value in self.hyper.items() if value is not False}
        shown |= {"every": self.every} if self.every != 1 else {}
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in shown.items())})"

    @property
    def ratio(self) -> float:
        """Tell N/M, the share of the batch in the second pass.

        Example:
            >>> import timm
            >>> from apart_hf import create_strategy
            >>> create_strategy("apart", timm.create_model("test_resnet"), ratio=0.5).ratio
            0.5
        """
        return self.hyper.get("ratio", 1.0)

    @property
    def passes(self) -> float:
        """Tell the mean cost of a step, in passes over the batch (see `Method.passes`).

        Example:
            >>> import timm
            >>> from apart_hf import create_strategy
            >>> model = timm.create_model("test_resnet")
            >>> create_strategy("apart", model, ratio=0.5).passes, create_strategy("sam", model, every=4).passes
            (1.5, 1.25)
        """
        return self.method.passes(every=self.every, **self.hyper)

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
        size = whole_size(self.ratio, samples)
        for perturbation in self.perturbations:
            perturbation.check(size)
        return size

    def set(self, **changes: Any) -> None:
        """Change hyper-parameters between two steps, for instance by a schedule.

        Args:
            **changes: hyper-parameters of the method, `every` or `uneven`, checked as `create_strategy` checks them.

        Raises:
            ApartError: where one is unknown or out of its range. Then nothing was changed.

        Example:
            >>> import timm
            >>> from apart_hf import create_strategy
            >>> strategy = create_strategy("apart-sam", timm.create_model("test_resnet"), groups=4)
            >>> for step in range(3):
            ...     strategy.set(epsilon=0.05 * step, rho=0.1 * step)
            >>> strategy.set(every=2)
            >>> strategy
            apart-sam(epsilon=0.1, groups=4, rho=0.2, ratio=1.0, every=2)
        """
        changes = python_numbers(changes)
        every, uneven = changes.pop("every", self.every), changes.pop("uneven", self.uneven)
        for key in changes:
            if key not in self.hyper:
                has = ", ".join([*self.hyper, "every", "uneven"])
                raise ApartError(f"method {self.name!r} has no hyper-parameter {key!r} to set; it has {has}.")
        hyper = self.hyper | changes
        self._check(hyper, every, uneven)
        same = (bool, int, float, str)  # a tensor, say, is for the perturbation to judge
        changed = frozenset(k for k, v in hyper.items() if not isinstance(v, same) or v != self.hyper[k])
        if changed:
            self._change(hyper, changed)
        self.hyper, self.every, self.uneven = HyperParameters(hyper), every, uneven

    def state_dict(self) -> dict[str, Any]:
        """Return what must be kept between steps to go on exactly.

        Returns:
            The "name" of the method, its hyper-parameters under "hyper", "every" and "uneven", the number of "steps"
            that were made, what the strategy was made with, where a generator was given, its state under "generator",
            and, where there is auxiliary BN, its statistics and parameters under "auxiliary".

        Example:
            >>> import timm, torch
            >>> from apart_hf import create_strategy
            >>> model, generator = timm.create_model("test_resnet"), torch.Generator().manual_seed(0)
            >>> state = create_strategy("sam", model, generator=generator, every=3).state_dict()
            >>> state["name"], state["steps"], state["every"], state["hyper"]
            ('sam', 0, 3, {'rho': 0.05, 'global_norm': False})
        """
        state: dict[str, Any] = {"name": self.name, "steps": self.steps, "every": self.every, "uneven": self.uneven}
        state |= {"hyper": dict(self.hyper), "made_with": dict(self._made_with)}
        for auxiliary in auxiliary_of(self.perturbations):
            state["auxiliary"] = auxiliary.state_dict()
        return state if self.generator is None else state | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned.

        Hyper-parameters, `every` and `uneven` are then those of the state. A warning says so where the strategy was
        made with others than the one that was saved; what `set` has changed in between goes on without one. What the
        state lacks stays as it is: earlier versions kept the generator alone.

        Args:
            state: that of a strategy of the same method.

        Raises:
            ApartError: where one of the two has a generator, and the other has none, or the state is of another method.
                Then nothing was changed.

        Example:
            >>> import timm, torch
            >>> from apart_hf import create_strategy
            >>> model = timm.create_model("test_resnet")
            >>> one = create_strategy("random-bn", model, epsilon=0.2, generator=torch.Generator().manual_seed(0))
            >>> other = create_strategy("random-bn", model, generator=torch.Generator())
            >>> other.load_state_dict(one.state_dict())
            >>> torch.equal(one.generator.get_state(), other.generator.get_state()), other.hyper["epsilon"]
            (True, 0.2)
        """
        given = self._made_with
        self._load(state)
        say_overridden(self.name, given, self._made_with, self._in_use())

    def take_over(self, other: StrategyState) -> None:
        """Go on from where another strategy is, which was made with the same values, for another form of its model.

        Auxiliary gamma and beta become the very parameters of the other, which an optimizer may have.

        Args:
            other: of the same method.

        Raises:
            ApartError: as `load_state_dict` does.

        Example:
            >>> import timm, torch
            >>> from apart_hf import create_strategy
            >>> model = timm.create_model("test_resnet")
            >>> one = create_strategy("sam", model)
            >>> one.set(rho=0.3)
            >>> other = create_strategy("sam", torch.compile(model))
            >>> other.take_over(one)
            >>> other
            sam(rho=0.3)
        """
        self._load(other.state_dict())
        share_parameters(other.perturbations, self.perturbations)

    def _load(self, state: dict[str, Any]) -> None:
        check_state(self.name, self.hyper, self.generator is not None, state)
        held = [(p, state["auxiliary"]) for p in auxiliary_of(self.perturbations) if "auxiliary" in state]
        for auxiliary, its_state in held:
            auxiliary.check_state(its_state)
        hyper = state.get("hyper", self.hyper)
        self.set(**hyper, every=state.get("every", self.every), uneven=state.get("uneven", self.uneven))
        self.steps = state.get("steps", self.steps)
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        for auxiliary, its_state in held:
            auxiliary.load_state_dict(its_state)
        self._made_with = self._made_with | made_with(state)

    def _in_use(self) -> dict[str, Any]:
        return {**self.hyper, "every": self.every, "uneven": self.uneven}

    def _check(self, hyper: dict[str, Any], every: Any, uneven: Any) -> None:
        """Check what no perturbation does."""
        ratio = hyper.get("ratio", 1.0)
        if not (isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and 0 < ratio <= 1):
            raise ApartError(f"ratio={written(ratio)}: N/M, the share of the batch in the second pass, is in (0, 1].")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            text = written(every)
            raise ApartError(f"every={text}: the second pass is made in each so-manieth step, an integer >= 1.")
        if uneven not in ("error", "plain", "fit"):
            raise ApartError(f"uneven={written(uneven)}: choose 'error', 'plain' or 'fit'.")

    def _change(self, hyper: dict[str, Any], changed: frozenset[str]) -> None:
        """Change what has a hyper-parameter that changed, and nothing else: a schedule calls this in each step."""
        pairs = zip(self.perturbations, self.method.perturbations)
        affected = [(old, kind) for old, kind in pairs if changed.intersection(old.defaults)]
        made = made_perturbations([kind for _, kind in affected], self.model, hyper, self._pixel_scale)
        combination = self.combination
        if changed.intersection(combination.defaults):
            combination = made_combination(self.method, self.model, hyper)
        take_over([old for old, _ in affected], made, changed)
        self.combination = combination
