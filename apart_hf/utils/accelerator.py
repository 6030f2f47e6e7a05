"""An Accelerator whose processes are those that were started, or one line that says why there is none."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from apart_hf.errors import ApartError, first_line
from apart_hf.utils.launcher import launch, torchrun

if TYPE_CHECKING:
    from accelerate import Accelerator


def start_accelerator(**settings: Any) -> Accelerator:
    """Make an Accelerator.

    Args:
        **settings: its arguments.

    Returns:
        The Accelerator of all processes that were started.

    Raises:
        ApartError: where the environment, or an earlier Accelerator of this process, does not let it be made so, or it
            would not join all processes.
    """
    from accelerate import Accelerator  # a second and a half

    try:
        accelerator = Accelerator(**settings)
        torch.empty(1, device=accelerator.device)  # it may have been named, and not be there
    except (AssertionError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # another process is not there
            raise
        raise ApartError(
            f"accelerate does not start as it is configured here ({first_line(error)}); look for its variables, "
            "ACCELERATE_..., and for its file of `accelerate config`."
        ) from error
    _check_joined(accelerator)
    return accelerator


def _check_joined(accelerator: Accelerator) -> None:
    """Raise where the processes that were started are not those of one run.

    Accelerate joins processes on the CPU where it is told to use it, and on GPUs where torchrun's variables are there.
    """
    started, joined, device = launch(), accelerator.num_processes, accelerator.device.type
    launcher = started.launcher
    if launcher is None or started.processes == joined:
        return
    if launcher.name == "torchrun" and (device == "cpu" or "LOCAL_RANK" in os.environ):
        cure = "set ACCELERATE_USE_CPU=true"
    else:
        begin = torchrun(started.processes, on_cpu=device == "cpu")
        cure = f"start them by {begin}, or, for runs that have nothing to do with each other, set WORLD_SIZE=1"
    raise ApartError(
        f"{started.processes} processes were started ({launcher.size}={started.processes}), and accelerate joins "
        f"{joined} on {device}: they would work beside each other, into the same files; {cure}."
    )
