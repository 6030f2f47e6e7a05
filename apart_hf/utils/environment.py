"""What a result was made with: machine, versions, commit."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from apart_hf.utils.processes import cores
from apart_hf.version import __version__

LIBRARIES = ("torch", "timm", "accelerate", "datasets", "huggingface-hub", "safetensors", "evaluate")


def device_name() -> str:
    """Say in words what training here runs on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{cores()} cores of {names[0] if names else platform.processor() or platform.machine()}"


def git_commit() -> str | None:
    """Return the commit of the checkout that this package runs from, with a + where files were changed; else None."""
    here = Path(__file__).parents[2]
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
    """Return the versions of Python, this package and the libraries that results depend on, where installed."""
    found = {"apart_hf": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # packed data are read without datasets
            found[name] = version(name)
    return found
