"""Running statistics of BatchNorm, which differ between processes: each has those of its own batches."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.utils import distribute_bn
from torch import Tensor, nn


def average_statistics(accelerator: Accelerator, *networks: nn.Module) -> None:
    """Give all processes the mean of their running statistics, by timm's way.

    Args:
        accelerator: of the processes.
        *networks: in any wrapper; the same one may be there twice.
    """
    if accelerator.num_processes == 1:
        return
    plain = (accelerator.unwrap_model(network, keep_torch_compile=False) for network in networks)
    for network in dict.fromkeys(plain):
        distribute_bn(network, accelerator.num_processes, reduce=True)


def with_first_buffers(accelerator: Accelerator, network: nn.Module) -> nn.Module:
    """Give all processes the buffers of the first one, which are what is exported.

    Args:
        accelerator: of the processes.
        network: in any wrapper.

    Returns:
        The network; of several processes without its wrapper.
    """
    if accelerator.num_processes == 1:
        return network
    for buffer in network.buffers():
        buffer.copy_(broadcast(buffer, from_process=0))
    return accelerator.unwrap_model(network, keep_torch_compile=False)


def running_statistics(network: nn.Module) -> dict[str, Tensor]:
    """Return copies of the running means and variances by name."""
    kept = ("running_mean", "running_var")
    return {name: buffer.clone().cpu() for name, buffer in network.named_buffers() if name.endswith(kept)}
