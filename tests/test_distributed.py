"""Two processes (gloo, CPU) against the oracle on the same two parts of a batch."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import convert_sync_batchnorm
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from apart_hf import create_strategy
from tests.helpers import assert_same, batch, build, gradients
from tests.reference import reference_step
from tests.test_strategies_oracle import HYPER

RANKS = 2


def start(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)


def on_two_ranks(worker, folder, *arguments):
    """What worker(rank, folder, *arguments) left in folder/RANK.pt."""
    mp.spawn(worker, args=(folder, *arguments), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def worker(rank, folder, method):
    start(rank, folder)
    model = build("test_byobnet")
    wrapped = DistributedDataParallel(model)
    reductions = []

    def count(_, bucket):
        reductions.append(1)
        return default_hooks.allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, count)
    images, targets = (part.chunk(RANKS)[rank] for part in batch(16))
    strategy = create_strategy(method, wrapped, **HYPER.get(method, {}))
    strategy.accumulate_gradients(images, targets, cross_entropy)
    found = copy.deepcopy({"gradients": gradients(model), "buffers": dict(model.named_buffers())})
    # once more, now that DDP has settled its buckets, and a plain backward to compare with
    for key, step in (("reductions", lambda: strategy.accumulate_gradients(images, targets, cross_entropy)),
                      ("plain_reductions", lambda: cross_entropy(wrapped(images), targets).backward())):
        reductions.clear()
        step()
        found[key] = len(reductions)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["standard", *HYPER])
def test_two_ranks_agree_with_the_oracle(method, tmp_path):
    ranks = on_two_ranks(worker, tmp_path, method)
    want, buffers, _ = reference_step(
        build("test_byobnet"), *batch(16), cross_entropy, method, ranks=RANKS, **HYPER.get(method, {})
    )
    for rank in ranks:
        assert_same(rank["gradients"], want)
        assert rank["reductions"] == rank["plain_reductions"] > 0  # one all-reduce of the gradients a step
    floats = {n: b for n, b in buffers.items() if b.is_floating_point()}
    assert_same({n: ranks[0]["buffers"][n] for n in floats}, floats)
    assert all(torch.equal(ranks[0]["gradients"][n], ranks[1]["gradients"][n]) for n in want)


def synchronised_worker(rank, folder, name, layout):
    start(rank, folder)
    model = convert_sync_batchnorm(build(name)).to(memory_format=layout)
    images, targets = (part.chunk(RANKS)[rank] for part in batch(16))
    strategy = create_strategy("apart", model, **HYPER["apart"])
    strategy.accumulate_gradients(images.contiguous(memory_format=layout), targets, cross_entropy)
    for p in model.parameters():  # what DDP does; it refuses SyncBatchNorm on the CPU
        dist.all_reduce(p.grad)
        p.grad /= RANKS
    torch.save({"gradients": gradients(model), "buffers": dict(model.named_buffers())}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet"])
def test_synchronised_batchnorm_is_one_process_on_the_joint_batch(name, layout, tmp_path):
    """SyncBatchNorm and timm's SyncBatchNormAct: group k is that of both ranks together."""
    ranks = on_two_ranks(synchronised_worker, tmp_path, name, layout)
    want, buffers, _ = reference_step(build(name), *batch(16), cross_entropy, "apart", **HYPER["apart"])
    for rank in ranks:
        assert_same(rank["gradients"], want)
        assert_same({n: b.double() for n, b in rank["buffers"].items()}, {n: b.double() for n, b in buffers.items()})
