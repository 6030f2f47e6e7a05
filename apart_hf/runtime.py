"""The process around a run: threads and versions."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from apart_hf.errors import ApartError

Result = TypeVar("Result")

LIBRARIES = ("torch", "timm", "accelerate", "datasets", "huggingface-hub", "safetensors", "evaluate")


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def rank() -> int:
    """Number of this process in its run, also before there is an accelerator to ask."""
    return int(os.environ.get("RANK", 0))


def device_name() -> str:
    """What training here runs on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{cores()} cores of {names[0] if names else platform.processor() or platform.machine()}"


def from_main_process(accelerator: Accelerator, call: Callable[[], Result]) -> Result:
    """What `call` gives on the main process, where alone it runs; or the ApartError that it raises there, on all."""
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


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with a + where files were changed since; else None."""
    here = Path(__file__).parents[1]
    if not (here / ".git").exists():
        return None
    try:
        answers = [
            subprocess.run(["git", "-C", str(here), *command], capture_output=True, text=True, check=True, timeout=10)
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return answers[0].stdout.strip() + ("+" if answers[1].stdout.strip() else "")


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that the results depend on."""
    from apart_hf import __version__

    return {"apart_hf": __version__, "python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
