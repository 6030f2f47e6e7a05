"""Which launcher has started the processes of a run, and how many, as it says in their environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launcher:
    """Describes a program that starts several processes, and tells each of them so by variables.

    Args:
        name: of the program.
        size: variable with the number of processes.
        rank: variable with the number of this one, from 0.
        option: of its command line, which decides how many there are.
        within: variable without which the other two say nothing.
    """

    name: str
    size: str
    rank: str
    option: str
    within: str | None = None


# In this order: mpirun and srun may start torchrun, once on each machine, and mpirun may start its processes by srun.
# SLURM_NTASKS alone is of an allocation, in which nothing need have been started.
LAUNCHERS = (
    Launcher("torchrun", "WORLD_SIZE", "RANK", "--nproc-per-node"),
    Launcher("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "-n"),
    Launcher("mpiexec", "PMI_SIZE", "PMI_RANK", "-n"),
    Launcher("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "-n"),
    Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "--ntasks"),
    Launcher("srun", "SLURM_NTASKS", "SLURM_PROCID", "--ntasks", within="SLURM_STEP_ID"),
)


@dataclass(frozen=True)
class Launch:
    """Says how this process was started.

    Args:
        launcher: of several processes; None: there is none.
        processes: that were started.
        rank: number of this one.
    """

    launcher: Launcher | None
    processes: int
    rank: int

    def cure(self, wanted: int, *, on_cpu: bool) -> str:
        """Say how another number of processes is started, other than they were now."""
        by_accelerate = "ACCELERATE_DYNAMO_MODE" in os.environ  # which `accelerate launch` always sets
        if self.launcher is not None:
            name, option = self.launcher.name, self.launcher.option
            if by_accelerate and name == "torchrun":
                name, option = "accelerate launch", "--num_processes"
            return f"{name} starts as many as its {option} says, here {self.processes}; make them {wanted}"
        only_one = "accelerate launch started one; " if by_accelerate else ""
        return f"{only_one}start them by {torchrun(wanted, on_cpu=on_cpu)}"


def torchrun(processes: int, *, on_cpu: bool) -> str:
    """Write the beginning of a command that starts processes which accelerate joins."""
    return f"{'ACCELERATE_USE_CPU=true ' if on_cpu else ''}torchrun --nproc-per-node {processes}"


def launch() -> Launch:
    """Read how this process was started, also before there is an accelerator to ask."""
    for launcher in LAUNCHERS:
        processes = _number(launcher.size)
        if processes and (launcher.within is None or launcher.within in os.environ):
            return Launch(launcher, processes, _number(launcher.rank))
    return Launch(None, 1, _number("RANK"))


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0
