"""Two processes of torch.distributed (gloo) that run a function of a test."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.fork_server import fork_server

RANKS = 2


def start_rank(rank, folder):
    torch.set_num_threads(1)
    # what an Accelerator asks; the port is not used, since the processes have met by then
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true"}
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)


def on_two_ranks(worker, folder, *arguments, forked_here=False):
    """What worker(rank, folder, *arguments) left in folder/RANK.pt.

    `forked_here`: the processes are forks of this one, which has imported what they need.
    """
    if not forked_here:
        fork_server()
    method = "fork" if forked_here else "forkserver"
    mp.start_processes(worker, args=(folder, *arguments), nprocs=RANKS, start_method=method)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
