"""The processes of a run: how many, which one this is, their threads, and the signals that stop them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from apart_hf.errors import ApartError
from apart_hf.utils.launcher import launch

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")


def cores() -> int:
    """Count the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def age() -> float:
    """Return the seconds since this process was started, before any of its imports."""
    import psutil

    return max(0.0, time.time() - psutil.Process().create_time())


def rank() -> int:
    """Return the number of this process in its run, also before there is an accelerator to ask."""
    return launch().rank


def from_main_process(accelerator: Accelerator, call: Callable[[], Result]) -> Result:
    """Return, on all processes, what `call` gives on the main one, where alone it runs; or raise its ApartError."""
    from accelerate.utils import broadcast_object_list  # heavy, and a command line asks this module for ranks only

    found = problem = None
    if accelerator.is_main_process:
        try:
            found = call()
        except ApartError as error:
            problem = error
    found, problem = broadcast_object_list([found, problem])
    if problem is not None:
        raise problem
    return found


def anywhere(accelerator: Accelerator, here: bool) -> bool:
    """Tell whether something is so on any process of the run; all of them ask together."""
    if accelerator.num_processes == 1:
        return here
    return bool(accelerator.reduce(torch.tensor(int(here), device=accelerator.device), "sum"))


def use_threads(threads: int | None, local_processes: int) -> int:
    """Set the CPU threads of this process and return them.

    `accelerate launch` sets OMP_NUM_THREADS=1 where nobody set it, which would leave all cores but one idle on a CPU
    run; so 1 is taken as "not set". Any other value, or `threads`, is what the user asked for.
    """
    if threads is None:
        asked = os.environ.get("OMP_NUM_THREADS", "1")
        threads = int(asked) if asked.isdigit() and int(asked) > 1 else max(1, cores() // local_processes)
    torch.set_num_threads(threads)
    return threads


SIGNALS = (signal.SIGTERM, signal.SIGINT, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))


def in_a_group_of_its_own(worker: int) -> None:
    """Take a loader process out of its group, which launchers and terminals signal: the run needs it for its last step.

    They end with the run, which tells them to.
    """
    if hasattr(os, "setpgrp"):  # else the system has no process groups
        os.setpgrp()
