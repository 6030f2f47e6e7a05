"""transformers: a Trainer whose step makes both passes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from apart_hf.errors import ApartError
from apart_hf.integrations.extras import brought_by
from apart_hf.integrations.own_parameters import join_groups
from apart_hf.integrations.transformers_arguments import ApartTrainingArguments, method_options
from apart_hf.integrations.transformers_state import ApartState
from apart_hf.integrations.untraced import Traces
from apart_hf.strategies.auxiliary_batchnorm import share_parameters
from apart_hf.strategies.checks import check_model
from apart_hf.strategies.create import create_strategy
from apart_hf.strategies.loss import create_loss
from apart_hf.strategies.sample_count import count_samples
from apart_hf.strategies.two_pass import TwoPassStrategy
from apart_hf.strategies.two_pass_loss import TwoPassLoss

with brought_by("transformers", "transformers"):
    from transformers import Trainer

__all__ = ["ApartMixin", "ApartTrainer", "ApartTrainingArguments"]
_CURE = "override count_samples(inputs) of the trainer, which returns it"


class ApartMixin:
    """Lets a transformers Trainer train by a method: `class MyTrainer(ApartMixin, SomeTrainer)`.

    Its training_step calls the trainer's own, in which compute_loss makes both passes. So label smoothing,
    compute_loss_func, an override of compute_loss, accumulation, precision, clipping and evaluation are the trainer's.
    compute_loss is called twice in a step; what it logs or collects on the trainer counts once. The method and its
    hyper-parameters are in the arguments, see `ApartTrainingArguments`.

    Args:
        *args, **kwargs: of the trainer.

    Raises:
        ApartError: as `create_strategy` does, and for arguments without the fields of `ApartTrainingArguments`.

    Example:
        >>> from apart_hf.integrations.transformers import ApartMixin, ApartTrainer
        >>> from transformers import Trainer
        >>> class MyTrainer(ApartMixin, Trainer):
        ...     def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ...         outputs = model(**inputs)
        ...         loss = outputs.loss + 1e-3 * outputs.logits.square().mean()
        ...         return (loss, outputs) if return_outputs else loss
        >>> issubclass(ApartTrainer, ApartMixin)
        True
    """

    #: A strategy whose parameters are those of the optimizer.
    _optimised: TwoPassStrategy | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(ApartMixin):
            raise ApartError(
                f"{cls.__name__} names ApartMixin after a trainer, whose training_step then hides it; name it first."
            )

    def __init__(self, *args: Any, **kwargs: Any):
        model = kwargs.get("model", args[0] if args else None)
        if model is not None:
            check_model(model)  # before transformers asks it for what no other object has
        super().__init__(*args, **kwargs)
        trainer: Any = self
        trainer.callback_handler.callbacks.insert(0, ApartState())  # the first: others may set what it has begun
        self._make(create_strategy, trainer.model)  # bad input is told before training

    @property
    def strategy(self) -> TwoPassStrategy:
        """Return the strategy, for `strategy.set` in a callback and for its figures.

        Raises:
            ApartError: before `train`.

        Example:
            >>> from apart_hf.integrations.transformers import ApartTrainer
            >>> from transformers import TrainerCallback
            >>> class Warmup(TrainerCallback):
            ...     def __init__(self, trainer):
            ...         self.trainer = trainer
            ...     def on_step_begin(self, args, state, control, **kwargs):
            ...         self.trainer.strategy.set(epsilon=0.1 * min(1.0, state.global_step / 100))
        """
        trainer: Any = self
        if trainer.is_in_train:
            return self._loss_of(trainer.model_wrapped).strategy
        loss = self._keeper.loss
        if loss is None:
            raise ApartError("the trainer has a strategy once train has begun; use it in a callback.")
        return loss.strategy

    def count_samples(self, inputs: Mapping[str, Any]) -> int | None:
        """Tell how many samples a batch has, where its tensors do not: override it for such batches.

        Args:
            inputs: as training_step has them.

        Returns:
            Their number: tensors of that length are cut where the ratio is below 1, others belong to all samples.
            None: every tensor has a row for each sample.

        Example:
            >>> from apart_hf.integrations.transformers import ApartTrainer
            >>> class MyTrainer(ApartTrainer):
            ...     def count_samples(self, inputs):
            ...         return len(inputs["labels"])
        """
        return None

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Make both passes over a batch, and their backward; see the trainer's own."""
        own = self.__dict__.get("compute_loss")
        compute_loss = cast(Any, self).compute_loss

        def two_passes(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            named = dict(zip(("return_outputs", "num_items_in_batch"), args))
            return self._two_passes(model, inputs, _Call(self, compute_loss, named | kwargs))

        try:
            self.__dict__["compute_loss"] = two_passes
            return cast(Any, super()).training_step(model, inputs, *args, **kwargs)
        finally:
            del self.__dict__["compute_loss"]
            self.__dict__.update({} if own is None else {"compute_loss": own})

    def _two_passes(self, model: nn.Module, inputs: Any, call: _Call) -> Any:
        loss, samples, rows = self._loss_of(model), self.count_samples(inputs), None
        if loss.strategy.counts_samples:
            rows = torch.empty(count_samples(inputs, cure=_CURE) if samples is None else samples)
        ends_step = cast(Any, self).accelerator.sync_gradients
        return loss((inputs, rows, call), samples=samples, ends_step=ends_step)

    @property
    def _keeper(self) -> ApartState:
        callbacks = cast(Any, self).callback_handler.callbacks  # Trainer makes it anew where it restores callbacks
        return next(one for one in callbacks if isinstance(one, ApartState))

    def _loss_of(self, model: nn.Module) -> TwoPassLoss[Any, Any]:
        """Return the loss of the model that is trained, which is made, or made anew, once it is wrapped."""
        keeper = self._keeper
        if keeper.loss is None or keeper.loss.model is not model:
            before, keeper.loss = keeper.loss, self._make(create_loss, model, _Call.in_pass)
            if self._optimised is not None:
                share_parameters(self._optimised.perturbations, keeper.loss.strategy.perturbations)
            kept = keeper.take_kept()
            if before is not None:
                keeper.loss.go_on_from(before)
            elif kept is not None:
                keeper.loss.load_state_dict(kept)
        return keeper.loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the trainer's optimizer, which trains an auxiliary gamma and beta as well; see the trainer's own."""
        trainer: Any = self
        optimizer = cast(Any, super()).create_optimizer(*args, **kwargs)
        if self._optimised is None or self._optimised.model is not trainer.model:
            self._optimised = self._make(create_strategy, trainer.model)
        join_groups([trainer.optimizer], self._optimised)
        return optimizer

    def _make(self, create: Callable[..., Any], *inputs: Any) -> Any:
        options = method_options(cast(Any, self).args)
        return create(options.pop("method"), *inputs, **options)


class _Call:
    """Computes the loss of one batch in each pass, by the trainer's compute_loss.

    Args:
        trainer: on which the second call leaves no trace.
        compute_loss: the trainer's own.
        named: its arguments beside model and inputs.
    """

    def __init__(self, trainer: Any, compute_loss: Callable[..., Any], named: dict[str, Any]):
        self._trainer, self._compute_loss, self._named = trainer, compute_loss, named
        self._traces, self._samples = Traces([trainer]), 0

    @staticmethod
    def in_pass(network: nn.Module, batch: tuple[Any, Tensor | None, _Call]) -> Any:
        inputs, rows, call = batch
        return call(network, copy.copy(inputs), rows)  # a copy: compute_loss takes the labels out of it

    def __call__(self, network: nn.Module, inputs: Any, rows: Tensor | None) -> Any:
        with self._traces.of_a_call() as is_first:
            if is_first:
                self._samples = 0 if rows is None else len(rows)
            else:
                self._trainer.__dict__["log"] = _no_log
            return self._compute_loss(network, inputs, **self._named | self._items(rows))

    def _items(self, rows: Tensor | None) -> dict[str, Any]:
        """Count the items for a loss that is a sum over items: samples of a part weigh as much as the whole's."""
        items = self._named.get("num_items_in_batch")
        if items is None or rows is None or len(rows) == self._samples:
            return {}
        return {"num_items_in_batch": items * (len(rows) / self._samples)}


def _no_log(*args: Any, **kwargs: Any) -> None:
    """Stand in the place of the trainer's log."""


class ApartTrainer(ApartMixin, Trainer):
    """Trains by a method as transformers' Trainer does: `ApartTrainer(model, ApartTrainingArguments(...), ...)`.

    See `ApartMixin`, which a Trainer of your own takes.

    Args:
        *args, **kwargs: of `transformers.Trainer`; `args` are `ApartTrainingArguments`.

    Raises:
        ApartError: as `create_strategy` does, and for other training arguments.

    Example:
        >>> import torch
        >>> from apart_hf.integrations.transformers import ApartTrainer, ApartTrainingArguments
        >>> from transformers import ResNetConfig, ResNetForImageClassification
        >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10)
        >>> model = ResNetForImageClassification(config)
        >>> data = [{"pixel_values": torch.randn(3, 32, 32), "labels": k % 10} for k in range(16)]
        >>> args = ApartTrainingArguments("output", apart_method="apart", apart_groups=4, max_steps=2, report_to="none")
        >>> trainer = ApartTrainer(model, args, train_dataset=data)
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        2
        >>> trainer.strategy
        apart(epsilon=0.1, groups=4, ratio=1.0)
    """
