"""One attacker of the min-max game (Eq. 2), as a strategy sees it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apart_hf.strategies.pass_samples import PassSamples


class Perturbation(PassSamples):
    """Moves something before the second pass; subclass it for a method of your own.

    It lives through one call of a strategy like this:

        with perturbation.observed(samples):     # the clean pass: collect the gradient to climb
            ...forward, backward...
        perturbation.ascend(generator)           # move against the defender
        for _ in range(further_passes):          # none, unless it ascends in several steps
            with perturbation.climbing(samples): # collect the gradient where it stands
                ...forward, backward...
            perturbation.ascend(generator)
        with perturbation.applied(samples):      # the perturbed pass; undone at the end, also by an exception
            ...forward, backward...
        perturbation.release()                   # what the call held, also after an exception in any pass

    In each of these passes the model is given `shown(batch)`.

    Args:
        model: the network, possibly wrapped.
        **hyper: the hyper-parameters that `defaults` names, each as a keyword. What is kept under the same name,
            `strategy.set` can change.

    Example:
        >>> from contextlib import contextmanager
        >>> import timm, torch
        >>> from apart_hf import METHODS, Method, Perturbation, create_strategy
        >>> class RandomWeights(Perturbation):
        ...     defaults = {"radius": 0.01}
        ...     def __init__(self, model, *, radius):
        ...         super().__init__(model)
        ...         self.radius = radius
        ...     @contextmanager
        ...     def applied(self, samples):
        ...         before = [(p, p.detach().clone()) for p in self.model.parameters()]
        ...         try:
        ...             with torch.no_grad():
        ...                 for p, _ in before:
        ...                     p.add_(self.radius * torch.randn_like(p))
        ...             yield
        ...         finally:
        ...             with torch.no_grad():
        ...                 for p, value in before:
        ...                     p.copy_(value)
        >>> METHODS["random-weights"] = Method("weights with noise", (RandomWeights,))
        >>> model = timm.create_model("test_resnet", num_classes=10)
        >>> strategy = create_strategy("random-weights", model, radius=0.02)
        >>> batch = torch.randn(8, 3, 32, 32), torch.arange(8)
        >>> loss, output = strategy.accumulate_gradients(*batch, torch.nn.CrossEntropyLoss())
        >>> strategy
        random-weights(radius=0.02, ratio=1.0)
        >>> del METHODS["random-weights"]
    """

    #: Hyper-parameters with their defaults; a boolean is an option that is off.
    defaults: ClassVar[dict[str, Any]] = {}
    #: True where `ascend` reads p.grad, so that it must hold the gradient of the clean pass alone.
    reads_weight_gradients: ClassVar[bool] = False
    #: True where `applied` reads the weights, so that others which move them are applied before.
    applied_last: ClassVar[bool] = False
    #: The hyper-parameters that are decided as the strategy is made: `strategy.set` does not change them.
    fixed: ClassVar[frozenset[str]] = frozenset()
    #: True where methods of a list that have the class each have one of it in common.
    shareable: ClassVar[bool] = False
    #: True where `applied` normalises BN layers by statistics of its own, so that auxiliary BN has none to keep.
    replaces_statistics: ClassVar[bool] = False
    #: True where the class takes what images are normalised by, as `mean` and `std`.
    takes_pixel_scale: ClassVar[bool] = False

    def __init__(self, model: nn.Module, **hyper: Any):
        self.model = model

    @classmethod
    def further_passes(cls, steps: int = 1, **hyper: Any) -> int:
        """Count the passes of the ascent between the clean and the perturbed one, over the samples of the latter.

        Args:
            steps: the hyper-parameter of that name, if there is one: how often `ascend` is called.
            **hyper: the other hyper-parameters.

        Returns:
            steps - 1: the gradient of the clean pass is the first to climb.

        Example:
            >>> from apart_hf import Perturbation
            >>> Perturbation.further_passes(), Perturbation.further_passes(steps=5)
            (0, 4)
        """
        return steps - 1

    def observed(self, samples: int) -> AbstractContextManager[None]:
        """Open the clean pass, in which the gradient to climb is collected; the base class does nothing.

        Args:
            samples: M, the samples of the batch.

        Returns:
            A context around its forward and backward.

        Example:
            >>> import timm
            >>> from apart_hf import Perturbation
            >>> with Perturbation(timm.create_model("test_resnet")).observed(samples=8):
            ...     pass  # forward, backward
        """
        return nullcontext()

    def shown(self, batch: Any) -> Any:
        """Return what the model is given in the place of a batch, in the pass that is open: here the batch itself.

        Args:
            batch: of any kind; it is not to be changed in place.

        Returns:
            A batch of the same kind.

        Example:
            >>> import timm
            >>> from apart_hf import Perturbation
            >>> Perturbation(timm.create_model("test_resnet")).shown([1, 2])
            [1, 2]
        """
        return batch

    def ascend(self, generator: torch.Generator | None = None) -> None:
        """Set the perturbation from what the latest pass gave; the base class does nothing.

        Args:
            generator: draws what is random; None: torch's global generator.

        Example:
            >>> import timm, torch
            >>> from apart_hf import create_strategy
            >>> (statistics,) = create_strategy("random-bn", timm.create_model("test_resnet")).perturbations
            >>> statistics.ascend(torch.Generator().manual_seed(0))
        """

    def figures(self) -> dict[str, Tensor]:
        """Return what the latest ascent shows, for a log; the base class shows nothing.

        Returns:
            Scalars by name, on the device. The names are always the same.

        Example:
            >>> import timm
            >>> from apart_hf import Perturbation
            >>> Perturbation(timm.create_model("test_resnet")).figures()
            {}
        """
        return {}

    def climbing(self, samples: int) -> AbstractContextManager[None]:
        """Open a pass of a further ascent, of this or another perturbation: in place, it collects its gradient.

        The model's parameters get no gradient, unless one that climbs `reads_weight_gradients`: those of this pass.

        Args:
            samples: N, the samples of that pass.

        Returns:
            A context around its forward and backward; the base class has that of `applied`.

        Example:
            >>> import timm
            >>> from apart_hf import Perturbation
            >>> with Perturbation(timm.create_model("test_resnet")).climbing(samples=8):
            ...     pass  # forward, backward
        """
        return self.applied(samples)

    def applied(self, samples: int) -> AbstractContextManager[None]:
        """Open the perturbed pass; at its end, also by an exception, the model is what it was.

        Args:
            samples: N, the samples of that pass.

        Returns:
            A context around its forward and backward.

        Example:
            >>> import timm, torch
            >>> from apart_hf import create_strategy
            >>> model, images = timm.create_model("test_resnet"), torch.randn(8, 3, 32, 32)
            >>> (statistics,) = create_strategy("random-bn", model, groups=2).perturbations
            >>> statistics.ascend()
            >>> with statistics.applied(samples=8):
            ...     perturbed = model(images)
            >>> torch.equal(perturbed, model(images))
            False
        """
        return nullcontext()

    def release(self) -> None:
        """Let go of what was held for one call of a strategy, at its end, also by an exception: here of nothing.

        Example:
            >>> import timm
            >>> from apart_hf import Perturbation
            >>> Perturbation(timm.create_model("test_resnet")).release()
        """
