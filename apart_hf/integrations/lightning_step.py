"""The training_step of a LightningModule as a loss function that is called in both passes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from apart_hf.errors import ApartError
from apart_hf.integrations.extras import brought_by
from apart_hf.integrations.untraced import Traces

with brought_by("lightning", "lightning"):
    from lightning import LightningModule, Trainer
    from lightning.pytorch.loggers.logger import DummyLogger


def check_module(module: LightningModule) -> None:
    """Refuse a module whose step cannot be made of two calls of its training_step.

    Raises:
        ApartError: for manual optimization, and for a training_step that takes its batches from an iterator.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise ApartError(
            f"{name} has automatic_optimization=False, so that no callback can make its passes; let it call "
            "strategy.accumulate in training_step, as docs/LOOPS.md shows, or set it to True."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ApartError(
            f"training_step of {name} takes dataloader_iter, and the second pass needs the batch again; let it take "
            "(batch, batch_idx)."
        )


class NoLoss(Exception):
    """Carries what training_step returned in the place of a loss, for Lightning to judge: None skips the batch."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output


class StepCall:
    """Calls training_step in each pass; all calls but the first leave no trace.

    Args:
        trainer: that trains.
        module: that it trains.
    """

    def __init__(self, trainer: Trainer, module: LightningModule):
        self._trainer, self._module = trainer, module
        self._logging = [m for m in module.modules() if m is module or isinstance(m, LightningModule)]
        self._traces = Traces([module])

    @staticmethod
    def in_pass(network: nn.Module, batch: tuple[Any, Any, StepCall]) -> Any:
        inputs, named, call = batch
        return call(inputs, named)

    def __call__(self, inputs: Any, named: Any) -> Any:
        loggers = self._trainer.loggers
        with self._traces.of_a_call() as is_first:
            try:
                if not is_first:
                    self._trainer.loggers = [DummyLogger() for _ in loggers]
                    for module in self._logging:
                        module.__dict__.update(log=_say_nothing, log_dict=_say_nothing, print=_say_nothing)
                output = self._module.training_step(*inputs, **named)
            finally:
                self._trainer.loggers = loggers
        if isinstance(output, Mapping) and output.get("loss") is not None:
            return output["loss"], {key: value for key, value in output.items() if key != "loss"}
        if not isinstance(output, Tensor):
            raise NoLoss(output)
        return output


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in the place of a method that logs."""
