"""Misuse that would train wrongly, or fail far from its cause: models, losses and criteria that no strategy takes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from apart_hf.errors import ApartError, written
from apart_hf.strategies.machine import processes
from apart_hf.strategies.wrapping import wraps

_SHARDED = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine", "PipelineEngine")


def check_model(model: Any, accelerator: Any = None) -> None:
    """Refuse what is no network, or is wrapped in a way that the second pass cannot work with.

    Args:
        model: that a strategy is to be made for.
        accelerator: that it was prepared by, if any.

    Raises:
        ApartError: for an optimizer or another object that is no module; for DataParallel; for sharded weights; for a
            model that several processes train and `accelerator.prepare` has not wrapped.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        given = f"an optimizer ({kind})" if hasattr(model, "param_groups") else f"an object of type {kind}"
        raise ApartError(
            f"a strategy is made for a model (an nn.Module), and was given {given}; pass the model, and step the "
            "optimizer in the loop as always."
        )
    for module in model.modules():
        if isinstance(module, nn.DataParallel):
            raise ApartError(
                "the model is in nn.DataParallel, whose copies of the layers live for one forward only; use "
                "DistributedDataParallel, or one device (CUDA_VISIBLE_DEVICES=0)."
            )
        for parent in type(module).__mro__:
            if parent.__name__ in _SHARDED:
                raise ApartError(
                    f"the model is sharded ({parent.__name__}), and the second pass needs whole weights and gradients "
                    "on each process; use DistributedDataParallel."
                )
    shares = str(getattr(accelerator, "distributed_type", "")).rpartition(".")[2].startswith("MULTI")
    if shares and not wraps(model) and any(p.requires_grad for p in model.parameters()):
        raise ApartError(
            f"accelerate trains with {processes()} processes and the model is not prepared, so that their gradients "
            "would not be averaged; make the strategy of the model that accelerator.prepare returns."
        )


def check_helpers(accelerator: Any, autocast: Any) -> None:
    """Refuse what cannot do its part in a step.

    Raises:
        ApartError: for an accelerator without `backward`, and an autocast that is not called.
    """
    if accelerator is not None and not callable(getattr(accelerator, "backward", None)):
        raise ApartError(
            f"accelerator={written(accelerator)} is of type {type(accelerator).__name__}, which has no backward; pass "
            "an accelerate.Accelerator, or leave it out."
        )
    is_context = hasattr(autocast, "__enter__") and not isinstance(autocast, type)  # torch's is callable as well
    if autocast is not None and (is_context or not callable(autocast)):
        raise ApartError(
            f"autocast={written(autocast)} is of type {type(autocast).__name__}; pass a function that makes the "
            'context, for instance lambda: torch.autocast("cuda", torch.bfloat16).'
        )


def check_criterion(criterion: Any) -> None:
    """Refuse a criterion that sums over the samples, where it says so: the two passes weight means.

    Raises:
        ApartError: for reduction="sum".
    """
    reduction = None
    while isinstance(criterion, functools.partial):  # the outermost keyword counts
        reduction, criterion = reduction or criterion.keywords.get("reduction"), criterion.func
    if (reduction or getattr(criterion, "reduction", None)) == "sum":
        raise ApartError(
            "the criterion has reduction='sum', and the two passes weight means over their samples; use "
            "reduction='mean', and a learning rate times the batch size."
        )


def check_training(model: nn.Module) -> None:
    """Refuse a step that cannot train.

    Raises:
        ApartError: in eval mode, and under torch.no_grad or torch.inference_mode.
    """
    if not model.training:
        raise ApartError("the model is in eval mode; call model.train() before a step.")
    if not torch.is_grad_enabled():
        raise ApartError(
            "gradients are off (torch.no_grad or torch.inference_mode); take the step outside of that block."
        )


def check_loss(loss: Any) -> Tensor:
    """Return the loss of a pass, where it is one.

    Raises:
        ApartError: where it is no tensor, no scalar, or no function of what is trained.
    """
    if not isinstance(loss, Tensor):
        raise ApartError(
            f"the loss is of type {type(loss).__name__}; return a scalar tensor, or (loss, aux) from a function of the "
            "batch."
        )
    if loss.numel() != 1:
        raise ApartError(
            f"the loss has the shape {tuple(loss.shape)}, and a step needs one number; take the mean over the samples "
            "(reduction='mean')."
        )
    if loss.is_complex():
        raise ApartError(f"the loss is complex ({loss.dtype}), and a step needs a real number; take its real part.")
    if not loss.requires_grad:
        raise ApartError(
            "the loss does not require grad: it is detached, or nothing that it depends on is trained; call "
            "requires_grad_() on the parameters to train, and detach nothing on the way to the loss."
        )
    return loss


def split_result(result: Any) -> tuple[Any, Any]:
    """Take what a loss function returns apart: (loss, aux), where aux is None if there is none."""
    if isinstance(result, tuple):
        if len(result) == 2:
            return result[0], result[1]
        raise ApartError(f"the loss function returned a tuple of {len(result)}; return loss, or (loss, aux).")
    return result, None
