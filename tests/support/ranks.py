"""Two processes of torch.distributed (gloo) that run a function of a test."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.fork_server import fork_server

RANKS = 2


def start_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)


def on_two_ranks(worker, folder, *arguments):
    """What worker(rank, folder, *arguments) left in folder/RANK.pt."""
    fork_server()
    mp.start_processes(worker, args=(folder, *arguments), nprocs=RANKS, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
