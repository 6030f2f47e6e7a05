"""What fills p.grad for one batch, as a training loop calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apart_hf.strategies.algorithm import Algorithm, Backward, LossFunction
from apart_hf.strategies.auxiliary_batchnorm import auxiliary_of, stand_ins_of
from apart_hf.strategies.checks import check_criterion, check_helpers, check_training
from apart_hf.strategies.ddp import average_gradients, averages_gradients
from apart_hf.strategies.hyper_parameters import HasBackward, Uneven
from apart_hf.strategies.sample_count import count_images
from apart_hf.strategies.wrapping import WrappingCheck

if TYPE_CHECKING:
    from apart_hf.strategies.methods import Method


class TwoPassStrategy(Algorithm):
    """Runs Algorithm 1 for any list of perturbations; a training loop calls it in the place of `loss.backward()`.

    It is made by `create_strategy`. Between two calls the model is what it was before: the same modules, parameters,
    buffers and keys.

    Args:
        name: of the method, for messages.
        method: what it combines.
        model: the network, possibly wrapped.
        hyper: every hyper-parameter of the method.
        accelerator: see `create_strategy`, as for `generator`, `autocast`, `every`, `uneven`, `mean` and `std`.

    Attributes:
        perturbations: one `Perturbation` for each class that the method names.
        hyper: the hyper-parameters in use; `set` changes them.
        every, uneven: as `create_strategy` was given them.
        steps: how many were made.
        perturbed_loss: of the second pass over the latest batch, detached; None: there was none. `figures` has more.

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
        every: int = 1,
        uneven: Uneven = "error",
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ):
        check_helpers(accelerator, autocast)
        kept: dict[str, Any] = {"every": every, "uneven": uneven, "mean": mean, "std": std}
        super().__init__(name, method, model, hyper, generator=generator, autocast=autocast, **kept)
        self._accelerator, self._wrapping = accelerator, WrappingCheck(model)
        self._unaveraged = False  # gradients of what the strategy holds

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give the parameters that the strategy holds beside the model's, for the optimizer: auxiliary gamma and beta.

        Where processes train in DistributedDataParallel, their gradients are averaged as the model's are.

        Returns:
            None of them, for a method without any.

        Example:
            >>> import timm, torch
            >>> from apart_hf import create_strategy
            >>> model = timm.create_model("test_resnet", num_classes=10)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> strategy = create_strategy("advprop", model, aux_affine=True)
            >>> optimizer.add_param_group({"params": list(strategy.parameters())})
            >>> len(optimizer.param_groups), list(create_strategy("apart", model).parameters())
            (2, [])
        """
        return iter(stand_ins_of(self.perturbations).values())

    def buffers(self) -> Iterator[Tensor]:
        """Give the running statistics that the strategy holds beside the model's: those of auxiliary BN.

        Returns:
            None of them, for a method without any.

        Example:
            >>> import timm
            >>> from apart_hf import create_strategy
            >>> model = timm.create_model("test_resnet")
            >>> held = list(create_strategy("advprop", model).buffers())
            >>> len(held) == len(list(model.buffers())), list(create_strategy("apart", model).buffers())
            (True, [])
        """
        return (tensor for auxiliary in auxiliary_of(self.perturbations) for tensor in auxiliary.buffers())

    def accumulate(
        self,
        batch: Any,
        loss_fn: LossFunction,
        *,
        samples: int | None = None,
        backward: Backward | None = None,
        perturb: bool = True,
        ends_step: bool | None = None,
    ) -> tuple[Tensor, Any]:
        """Add this batch's gradient to `p.grad` of every trainable parameter, as `backward()` does (Algorithm 1).

        Args:
            batch: tensors of M samples in dicts, lists, tuples, dataclasses, or containers of those.
            loss_fn: loss_fn(batch) -> loss, or (loss, aux), by this strategy's model. The loss is a scalar, the *mean*
                over the samples. It is called once in each pass, in the second one with N samples.
            samples: M. None: the first dimension of the batch's tensors, which must be one for all that have any. Where
                M is given, tensors of another first dimension belong to all samples, and so does what is no tensor.
            backward: replaces `loss.backward()`, for instance `lambda loss: scaler.scale(loss).backward()`.
            perturb: False: a plain step in a single pass.
            ends_step: whether the optimizer steps after this batch, for `every`. None: as the accelerator says; without
                one, it does.

        Returns:
            (loss, aux) of the clean pass, detached, aux in the containers that loss_fn returned; None: there was none.

        Raises:
            ApartError: where the batch does not fit the hyper-parameters (also by a group with one value per channel in
                a layer), the model or all that is perturbed in it is in eval mode, the loss is none, or a layer's
                forward is replaced already.

        Example:
            >>> import timm, torch
            >>> from apart_hf import create_strategy
            >>> model = timm.create_model("test_resnet", num_classes=10)
            >>> strategy = create_strategy("apart", model, groups=2, ratio=0.5)
            >>> def loss_fn(batch):
            ...     logits = model(batch["pixel_values"])
            ...     return torch.nn.functional.cross_entropy(logits, batch["labels"]), {"logits": logits}
            >>> batch = {"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.arange(8)}
            >>> loss, aux = strategy.accumulate(batch, loss_fn)
            >>> loss.shape, aux["logits"].shape
            (torch.Size([]), torch.Size([8, 10]))
        """
        if self.perturbations:
            check_criterion(loss_fn)
        return self._accumulate(batch, loss_fn, samples, samples is None, backward, perturb, ends_step)

    def accumulate_gradients(
        self,
        images: Any,
        targets: Any,
        criterion: Callable[[Any, Any], Tensor],
        *,
        backward: Backward | None = None,
        perturb: bool = True,
        ends_step: bool | None = None,
    ) -> tuple[Tensor, Any]:
        """Add this batch's gradient to `p.grad`: `accumulate` for a model of one input, and a criterion.

        Args:
            images: (M, ...) the batch; or tensors of M samples in containers, which the model takes as they are.
            targets: (M, ...) class indices, or soft labels; or any containers of such.
            criterion: criterion(output, targets) -> scalar loss, the *mean* over the samples.
            backward: replaces `loss.backward()`, for instance `lambda loss: scaler.scale(loss).backward()`.
            perturb: False: a plain step in a single pass.
            ends_step: see `accumulate`.

        Returns:
            (loss, output) of the clean pass, detached: a scalar, and what the model returns, usually logits (M, C).

        Raises:
            ApartError: as `accumulate`, and where the criterion says that it sums over the samples.

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
        if self.perturbations:
            check_criterion(criterion)

        def loss_fn(batch: tuple[Any, Any]) -> tuple[Tensor, Any]:
            output = self.model(batch[0])
            return criterion(output, batch[1]), output

        samples = count_images(images, targets) if self.counts_samples else None
        return self._accumulate((images, targets), loss_fn, samples, True, backward, perturb, ends_step)

    def _accumulate(
        self,
        batch: Any,
        loss_fn: LossFunction,
        samples: int | None,
        strict: bool,
        backward: Backward | None,
        perturb: bool,
        ends_step: bool | None,
    ) -> tuple[Tensor, Any]:
        self._wrapping()
        check_training(self.model)
        if backward is None:
            backward = Tensor.backward if self._accelerator is None else self._accelerator.backward
        if ends_step is None:
            ends_step = getattr(self._accelerator, "sync_gradients", True)
        plan = self.plan(batch, samples, strict=strict, perturb=perturb)
        if plan is None:
            result = self.one_pass(batch, loss_fn, backward)
        else:
            result = self.two_passes(batch, loss_fn, backward, plan)
        self._unaveraged |= plan is not None
        if self._unaveraged and averages_gradients(self.model):
            average_gradients(list(self.parameters()))
            self._unaveraged = False
        self.steps += bool(ends_step)
        return result
