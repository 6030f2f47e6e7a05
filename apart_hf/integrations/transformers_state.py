"""The state of a method in a transformers Trainer's checkpoints: in trainer_state.json, tensors as text."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from torch import Tensor

from apart_hf.errors import ApartError
from apart_hf.integrations.extras import brought_by
from apart_hf.strategies.two_pass_loss import TwoPassLoss

with brought_by("transformers", "transformers"):
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

_TENSORS = "safetensors"


class ApartState(TrainerCallback, ExportableState):
    """Keeps a method's state in the Trainer's checkpoints, in trainer_state.json.

    Attributes:
        loss: that makes both passes; None before the first step.
        kept: the state to go on from, of a checkpoint, as it is written there.
    """

    def __init__(self) -> None:
        self.loss: TwoPassLoss[Any, Any] | None = None
        self.kept: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        kept = self.kept if self.loss is None else as_text(self.loss.state_dict())
        return {"args": {}, "attributes": {"kept": kept}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss = self.kept = None
        found = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            self.kept = found["attributes"]["kept"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.loss is None:
            raise ApartError(
                "the optimizer made a step without both passes, since the trainer has a training_step of its own that "
                "does not call super().training_step; let it, or name ApartMixin before the class that has it."
            )
        for p in self.loss.strategy.parameters():  # the trainer zeroes the gradients of the model alone
            p.grad = None

    def take_kept(self) -> dict[str, Any] | None:
        """Return the state to go on from, once; None: there is none."""
        kept, self.kept = self.kept, None
        return None if kept is None else from_text(kept)


def as_text(state: Mapping[str, Any]) -> dict[str, Any]:
    """Write dicts of tensors in a state as one string each, which JSON can hold, bit for bit."""
    return {key: {_TENSORS: _encoded(value)} if _holds_tensors(value) else value for key, value in state.items()}


def from_text(state: Mapping[str, Any]) -> dict[str, Any]:
    """Read what `as_text` has written."""
    return {
        key: safetensors.torch.load(base64.b64decode(value[_TENSORS]))
        if isinstance(value, dict) and _TENSORS in value
        else value
        for key, value in state.items()
    }


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(one, Tensor) for one in value.values())


def _encoded(tensors: Mapping[str, Tensor]) -> str:
    return base64.b64encode(safetensors.torch.save({k: t.cpu().contiguous() for k, t in tensors.items()})).decode()
