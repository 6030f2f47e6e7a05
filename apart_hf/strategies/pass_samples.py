"""The samples of the passes after the clean one, as a perturbation sees them: how many, which, in what order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor

from apart_hf.errors import ApartError


class PassSamples:
    """Says what a perturbation asks of the samples of a pass; it is the part of `Perturbation` that has no gradient."""

    #: False where the number of samples has no effect, so that it need not be known.
    counts_samples: ClassVar[bool] = True
    #: False within a pass whose samples cannot be put in another order; `order` then names none.
    sorts: bool = True

    def check(self, samples: int) -> None:
        """Refuse a perturbed pass that is impossible; the base class takes any.

        Args:
            samples: N, the samples of that pass.

        Raises:
            ApartError: with the numbers and the cure.

        Example:
            >>> import timm
            >>> from apart_hf import ApartError, create_strategy
            >>> (statistics,) = create_strategy("apart", timm.create_model("test_resnet"), groups=4).perturbations
            >>> try:
            ...     statistics.check(samples=10)
            ... except ApartError as error:
            ...     print(str(error).split(";")[0])
            groups=4 does not divide the 10 samples of the perturbed pass
        """

    def fits(self, samples: int) -> Iterator[dict[str, Any]]:
        """Name hyper-parameters under which a perturbed pass is possible, for `uneven="fit"`.

        Args:
            samples: N, the samples of that pass.

        Returns:
            What differs from the hyper-parameters in use, the nearest to them first; further ones are for the case that
            the pass itself finds too few values in a layer. The base class changes nothing, where `check` allows it.

        Example:
            >>> import timm
            >>> from apart_hf import create_strategy
            >>> (statistics,) = create_strategy("apart", timm.create_model("test_resnet"), groups=16).perturbations
            >>> list(statistics.fits(samples=60)), list(statistics.fits(samples=8))
            ([{'groups': 15}], [{'groups': 8}, {'groups': 4}])
        """
        try:
            self.check(samples)
        except ApartError:
            return
        yield {}

    def order(self, samples: int) -> Tensor | None:
        """Name the order in which the perturbed pass computes fastest; it has no effect on the gradient.

        Args:
            samples: N, the samples of that pass.

        Returns:
            Indices of samples, (N,); None: they may stay as they are.

        Example:
            >>> import timm, torch
            >>> from apart_hf import create_strategy
            >>> model = timm.create_model("test_resnet").to(memory_format=torch.channels_last)
            >>> (statistics,) = create_strategy("apart", model, groups=2).perturbations
            >>> statistics.order(samples=6)
            tensor([0, 2, 4, 1, 3, 5])
        """
        return None

    def select(self, chosen: Tensor | None) -> None:
        """Take note of the samples of all passes after the clean one; the base class has none of its own.

        Args:
            chosen: (N,) indices of samples of the batch, in the order of those passes; None: all, in theirs.

        Example:
            >>> import timm, torch
            >>> from apart_hf import Perturbation
            >>> Perturbation(timm.create_model("test_resnet")).select(torch.tensor([3, 0]))
        """
