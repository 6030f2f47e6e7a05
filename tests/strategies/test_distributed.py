"""Two processes (gloo, CPU) against the oracle on the same two parts of a batch."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from apart_hf import ApartError, create_strategy
from tests.reference import reference_step
from tests.support.helpers import assert_same, batch, build, gradients
from tests.support.oracle import HYPER
from tests.support.ranks import RANKS, on_two_ranks, start_rank

CASES = [
    *((method, {}) for method in ["standard", *HYPER]),
    ("apart", {"local_attack": True}),
    ("sam", {"global_norm": True}),
    ("apart-asam", {"global_norm": True, "local_attack": True}),
]


ACCUMULATED = ("apart", "sam", "apart-sam", "gsam", "awp")


def worker(rank, folder):
    start_rank(rank, folder)
    reductions, collectives, all_reduce = [], [], dist.all_reduce

    def count(_, bucket):
        reductions.append(1)
        before, work = len(collectives), default_hooks.allreduce_hook(None, bucket)
        del collectives[before:]  # its own all-reduce
        return work

    def counted(tensor, *args, **kwargs):
        collectives.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    images, targets = (part.chunk(RANKS)[rank] for part in batch(16))
    cases = []
    for method, options in CASES:
        model = build("test_byobnet")
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, count)
        generator = torch.Generator().manual_seed(7 + rank)
        strategy = create_strategy(method, wrapped, generator=generator, **HYPER.get(method, {}), **options)
        collectives.clear()
        strategy.accumulate_gradients(images, targets, cross_entropy)
        found = copy.deepcopy({"gradients": gradients(model), "buffers": dict(model.named_buffers())})
        found["collectives"] = list(collectives)
        # once more, now that DDP has settled its buckets, and a plain backward to compare with
        for key, step in (
            ("reductions", lambda s=strategy: s.accumulate_gradients(images, targets, cross_entropy)),
            ("plain_reductions", lambda w=wrapped: cross_entropy(w(images), targets).backward()),
        ):
            reductions.clear()
            step()
            found[key] = len(reductions)
        cases.append(found)
    torch.save(cases, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.process
def test_two_ranks_agree_with_the_oracle(tmp_path):
    ranks = on_two_ranks(worker, tmp_path)
    model = build("test_byobnet")
    weights = sum(p.numel() for p in model.parameters())
    for (method, options), *found in zip(CASES, *ranks):
        want, buffers, deltas = reference_step(
            model,
            *batch(16),
            cross_entropy,
            method,
            ranks=RANKS,
            generator=torch.Generator().manual_seed(7),
            **HYPER.get(method, {}),
            **options,
        )
        attack = [sum(d.numel() for pair in deltas.values() for d in pair)] if "apart" in method else []
        for rank in found:
            assert_same(rank["gradients"], want)
            assert rank["reductions"] == rank["plain_reductions"] > 0  # one all-reduce of the gradients a step
            # beside it: the attack's few KB, and the gradient once more for SAM with a global norm
            assert rank["collectives"] == (
                attack * (not options.get("local_attack")) + [weights] * options.get("global_norm", False)
            )
        floats = {n: b for n, b in buffers.items() if b.is_floating_point()}
        assert_same({n: found[0]["buffers"][n] for n in floats}, floats)
        assert all(torch.equal(found[0]["gradients"][n], found[1]["gradients"][n]) for n in want)


def accumulating_worker(rank, folder):
    """Two micro-batches, the first without synchronisation; then 50 optimizer steps in float32."""
    start_rank(rank, folder)
    found = {}
    for method in ACCUMULATED:
        model = build("test_byobnet")
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        strategy = create_strategy(method, wrapped, **HYPER[method])
        for _ in range(2):  # the second time with buckets that are settled
            model.load_state_dict(build("test_byobnet").state_dict())
            wrapped.zero_grad(set_to_none=False)
            for k in range(2):
                images, targets = (part.chunk(RANKS)[rank] for part in batch(16, seed=k))
                with nullcontext() if k else wrapped.no_sync():
                    strategy.accumulate_gradients(images, targets, cross_entropy)
        found[method] = copy.deepcopy(gradients(model))

    attacked = build("test_efficientnet", dtype=torch.float32)
    strategy = create_strategy("apart", DistributedDataParallel(attacked), **HYPER["apart"])
    images, targets = (part.chunk(RANKS)[rank] for part in batch(16, dtype=torch.float32))
    strategy.accumulate_gradients(images, targets, cross_entropy)
    found["attack"] = strategy.perturbations[0]._deltas

    model = build("test_byobnet", dtype=torch.float32)
    wrapped = DistributedDataParallel(model)
    strategy = create_strategy("apart-sam", wrapped, groups=2, rho=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for k in range(50):
        strategy.accumulate_gradients(
            *(part.chunk(RANKS)[rank] for part in batch(8, seed=k, dtype=torch.float32)), cross_entropy
        )
        optimizer.step()
        optimizer.zero_grad()
    found["weights"] = dict(model.named_parameters())
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.process
def test_micro_batches_and_fifty_steps_on_two_ranks(tmp_path):
    ranks = on_two_ranks(accumulating_worker, tmp_path)
    for method in ACCUMULATED:
        # the buffers of the first micro-batch have no part in the gradient of the second
        parts = [
            reference_step(
                build("test_byobnet"), *batch(16, seed=k), cross_entropy, method, ranks=RANKS, **HYPER[method]
            )[0]
            for k in range(2)
        ]
        for rank in ranks:
            assert_same(rank[method], {n: parts[0][n] + parts[1][n] for n in parts[0]})
    assert all(torch.equal(ranks[0]["weights"][n], p) for n, p in ranks[1]["weights"].items())
    # float32 on two ranks attacks as the oracle does in float64, structural zeros and all
    _, _, deltas = reference_step(
        build("test_efficientnet"), *batch(16), cross_entropy, "apart", ranks=RANKS, **HYPER["apart"]
    )
    exact = torch.cat([d for pair in deltas.values() for d in pair]).sign()
    assert (exact == 0).double().mean() > 0.01
    for rank in ranks:
        assert not rank["attack"][exact == 0].any() and (rank["attack"].sign() != exact).double().mean() < 0.001


class Branches(torch.nn.Module):
    """Its second head is used for batches whose first pixel is positive."""

    def __init__(self):
        super().__init__()
        self.bn, self.heads = torch.nn.BatchNorm2d(3), torch.nn.ModuleList(torch.nn.Linear(3, 5) for _ in range(2))

    def forward(self, x):
        return self.heads[int(x[0, 0, 0, 0] > 0)](self.bn(x).square().mean((2, 3)))


def branching_worker(rank, folder):
    start_rank(rank, folder)
    torch.manual_seed(0)
    model = Branches()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    images, targets = batch(8, 8, dtype=torch.float32)
    images[0, 0, 0, 0] = 1.0 if rank else -1.0
    create_strategy("sam", wrapped, global_norm=True).accumulate_gradients(images, targets, cross_entropy)
    torch.save(gradients(model), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.process
def test_parameters_that_one_rank_does_not_use(tmp_path):
    ranks = on_two_ranks(branching_worker, tmp_path)
    assert all(g.any() and torch.equal(g, ranks[1][n]) for n, g in ranks[0].items())


def synchronised_worker(rank, folder, name, layout):
    start_rank(rank, folder)
    model = convert_sync_batchnorm(build(name)).to(memory_format=layout)
    images, targets = (part.chunk(RANKS)[rank] for part in batch(16))
    strategy = create_strategy("apart", model, **HYPER["apart"])
    strategy.accumulate_gradients(images.contiguous(memory_format=layout), targets, cross_entropy)
    for p in model.parameters():  # what DDP does; it refuses SyncBatchNorm on the CPU
        dist.all_reduce(p.grad)
        p.grad /= RANKS
    torch.save({"gradients": gradients(model), "buffers": dict(model.named_buffers())}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.process
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", [pytest.param("resnet18", marks=pytest.mark.slow), "test_efficientnet"])
def test_synchronised_batchnorm_is_one_process_on_the_joint_batch(name, layout, tmp_path):
    """SyncBatchNorm and timm's SyncBatchNormAct: group k is that of both ranks together."""
    ranks = on_two_ranks(synchronised_worker, tmp_path, name, layout)
    want, buffers, _ = reference_step(build(name), *batch(16), cross_entropy, "apart", **HYPER["apart"])
    for rank in ranks:
        assert_same(rank["gradients"], want)
        assert_same({n: b.double() for n, b in rank["buffers"].items()}, {n: b.double() for n, b in buffers.items()})


@pytest.mark.parametrize("kind", ["FSDP1", "FSDP2"])
def test_sharded_models_are_refused(kind, tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = build("test_byobnet", dtype=torch.float32)
        if kind == "FSDP2":
            fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        else:
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        with pytest.raises(ApartError, match=r"the model is sharded .*DistributedDataParallel"):
            create_strategy("apart", model)
    finally:
        dist.destroy_process_group()
