"""The Accelerator of a run, and what it takes from an environment that the run's settings do not know."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

from apart_hf.config.defaults import PRECISIONS
from apart_hf.config.train_config import TrainConfig
from apart_hf.errors import ApartError
from apart_hf.utils.accelerator import start_accelerator
from apart_hf.utils.launcher import launch

_SHARDS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed shards",
    "ACCELERATE_USE_FSDP": "FSDP shards",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM shards",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config of accelerate shards",
}


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Make the Accelerator that computes what the settings say, for all processes that were started.

    `accelerate launch` and its configuration file say by variables what a script leaves open. Precision is left open by
    `amp_dtype` None and read from there; all else is what the settings say, or the variable is refused.

    Args:
        config: its names are checked.

    Returns:
        The Accelerator.

    Raises:
        ApartError: where environment, machine and settings do not fit each other.
    """
    _check_environment(config)
    accelerator = start_accelerator(
        mixed_precision=None if config.amp_dtype is None else PRECISIONS[config.amp_dtype],
        log_with=config.report_to,
        project_dir=config.output,
        gradient_accumulation_steps=config.grad_accum_steps,
        dynamo_backend="inductor" if config.torchcompile else "no",
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
    )
    _check_accelerator(config, accelerator)
    return accelerator


def _check_environment(config: TrainConfig) -> None:
    """Raise for the first variable of accelerate that contradicts a setting, or is not supported."""
    for variable, name in _SHARDS.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise ApartError(
                f"{name} weights or gradients, which the second pass needs whole on each process; launch with "
                "plain data parallelism (accelerate launch --multi_gpu)."
            )
    variable, setting = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(config.grad_accum_steps)
    given = os.environ.get(variable, setting).strip()
    if given != setting:
        add = f", or give --grad-accum-steps {given}" if given.isdecimal() and int(given) > 0 else ""
        raise ApartError(
            f"{variable}={given}, and --grad-accum-steps {setting}, by which the schedule counts steps; unset the "
            f"variable{add}."
        )
    variable = "ACCELERATE_DYNAMO_BACKEND"
    given = os.environ.get(variable, "no")
    if given.lower() != "no" and not (config.torchcompile and given.lower() == "inductor"):
        setting = "--torchcompile compiles by inductor" if config.torchcompile else "--no-torchcompile does not compile"
        add = ", or give --torchcompile" if given.lower() == "inductor" else ""
        raise ApartError(
            f"{variable}={given}, and {setting}, which is what the run records; set the variable to no (accelerate "
            f"launch --dynamo_backend no){add}."
        )
    variable = "ACCELERATE_MIXED_PRECISION"
    given = os.environ.get(variable, "no")
    if config.amp_dtype is None and given.lower() not in PRECISIONS.values():
        raise ApartError(
            f"{variable}={given} is no precision that runs are made in: no, bf16 or fp16 (accelerate launch "
            "--mixed_precision); or give --amp-dtype."
        )


def _check_accelerator(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raise where an Accelerator does not go with the settings."""
    on_cpu = accelerator.device.type == "cpu"
    _check_device(config.device, accelerator)
    if accelerator.mixed_precision == "fp16" and on_cpu:
        raise ApartError("float16 needs a GPU (accelerate scales no gradients on the CPU); use --amp-dtype bfloat16.")
    compiles = accelerator.state.dynamo_plugin.backend.value.lower()
    if (compiles != "no") != config.torchcompile:
        raise ApartError(
            f"an Accelerator that was made earlier in this process has dynamo backend {compiles!r} for all that come "
            f"after it, and torchcompile is {config.torchcompile}; train in a new process."
        )
    wanted, joined = config.expect_processes, accelerator.num_processes
    if wanted not in (None, joined):
        raise ApartError(f"{joined} process(es) were started, not {wanted}; {launch().cure(wanted, on_cpu=on_cpu)}.")
    if config.sync_bn and on_cpu:
        raise ApartError("--sync-bn needs GPUs: torch has no synchronised BatchNorm for the CPU; leave the flag out.")


def _check_device(name: str | None, accelerator: Accelerator) -> None:
    """Raise where accelerate computes elsewhere than the setting says; a number without one is any."""
    if name is None:
        return
    try:
        wanted = torch.device(name)
    except RuntimeError as error:
        raise ApartError(f"--device {name}: torch knows no such device; cuda and cpu are two.") from error
    used = accelerator.device
    if wanted.type == used.type == "cpu":
        if wanted.index:
            raise ApartError(f"--device {name}: the CPU is one device, without a number; use --device cpu.")
        return
    if wanted.type != used.type or (wanted.index is not None and accelerator.num_processes == 1 and wanted != used):
        cure = "set ACCELERATE_USE_CPU=true" if wanted.type == "cpu" else "see nvidia-smi and CUDA_VISIBLE_DEVICES"
        raise ApartError(f"--device {name}: accelerate computes on {used} here; {cure}, or leave the flag out.")
