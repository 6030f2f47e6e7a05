"""Losses under DistributedDataParallel: its hooks fire in the one backward, and see what they see of a plain loss."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from apart_hf import create_loss, create_strategy
from tests.reference import reference_step
from tests.support.helpers import assert_same, batch, build, gradients, snapshot
from tests.support.ranks import RANKS, on_two_ranks, start_rank

HYPER = {
    "standard": {},
    "apart": {"groups": 2},
    "sam": {"rho": 0.1},
    "apart-sam": {"groups": 2, "rho": 0.2},
    "random-bn": {"groups": 2},
}


def loss_fn(model, part):
    output = model(part["x"])
    return cross_entropy(output, part["y"]), output


def share(rank, size, seed, dtype=torch.float64):
    x, y = (part.chunk(RANKS)[rank] for part in batch(size, 8, seed=seed, dtype=dtype))
    return {"x": x, "y": y}


def stepped(rank, method, way):
    """Three steps with momentum in float32: weights, buffers, losses."""
    model = build("small", dtype=torch.float32)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options = {"generator": torch.Generator().manual_seed(7 + rank)} | HYPER[method]
    options |= {"ratio": 0.5} if "groups" in options else {}
    compute_loss = create_loss(method, wrapped, loss_fn, **options) if way == "loss" else None
    strategy = create_strategy(method, wrapped, **options) if way == "strategy" else None
    found = {}
    for step in range(3):
        part = share(rank, 16, step, torch.float32)
        if compute_loss is not None:
            loss, _ = compute_loss(part)
            loss.backward()
        else:
            loss, _ = strategy.accumulate(part, lambda part: loss_fn(wrapped, part))
        found[f"loss {step}"] = loss.detach()
        optimizer.step()
        optimizer.zero_grad()
    return copy.deepcopy(found | model.state_dict())


def accumulated(rank, method, together):
    """Micro-batches, the last of them synchronised: by a backward each, or one of the sum."""
    model = build("small")
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    compute_loss = create_loss(method, wrapped, loss_fn, generator=torch.Generator().manual_seed(7), **HYPER[method])
    for _ in range(2):  # the second time with buckets that are settled
        compute_loss.strategy.generator.manual_seed(7)
        model.load_state_dict(build("small").state_dict())
        wrapped.zero_grad(set_to_none=False)
        total = 0
        for k in range(3):
            with nullcontext() if k == 2 or together else wrapped.no_sync():
                loss = compute_loss(share(rank, 32, k))[0] / 3
                if together:
                    total = total + loss
                else:
                    loss.backward()
        if together:
            total.backward()
    return copy.deepcopy(gradients(model))


def uneven(rank, kind):
    """A batch that fits on the first process, and does not on the second."""
    model = build("small")
    wrapped = DistributedDataParallel(model)
    compute_loss = create_loss("apart", wrapped, loss_fn, groups=4, uneven=kind)
    strategy = create_strategy("apart", wrapped, groups=4, uneven=kind)
    part, found = share(0, 16, 0) if rank == 0 else {k: v[:7] for k, v in share(1, 16, 0).items()}, []
    for step in (
        lambda: compute_loss(part)[0].backward(),
        lambda: strategy.accumulate(part, lambda part: loss_fn(wrapped, part)),
    ):
        model.load_state_dict(build("small").state_dict())
        wrapped.zero_grad()
        step()
        found.append(copy.deepcopy(gradients(model)))
    return found


def passed_over(rank):
    """A loss whose backward is never called, such as one that is not finite, and a plain evaluation."""
    model = build("small")
    wrapped = DistributedDataParallel(model)
    compute_loss = create_loss("sam", wrapped, loss_fn, **HYPER["sam"])
    compute_loss(share(rank, 16, 5))
    model.load_state_dict(build("small").state_dict())
    with torch.no_grad():
        compute_loss(share(rank, 16, 6))
    model.load_state_dict(build("small").state_dict())
    compute_loss(share(rank, 16, 0))[0].backward()
    return copy.deepcopy(gradients(model))


def worker(rank, folder):
    start_rank(rank, folder)
    found = {}
    for method in HYPER:
        found |= {(method, way): stepped(rank, method, way) for way in ("loss", "strategy")}
        found |= {(method, together): accumulated(rank, method, together) for together in (False, True)}
    found |= {kind: uneven(rank, kind) for kind in ("plain", "fit")} | {"passed over": passed_over(rank)}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def reference(method, seeds, size):
    """The mean of the oracle's gradients on the batches that the processes hold together."""
    generator, model = torch.Generator().manual_seed(7), build("small")
    more = {"ranks": RANKS, "generator": generator} | HYPER[method]
    found = [reference_step(model, *batch(size, 8, seed=k), cross_entropy, method, **more)[0] for k in seeds]
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


def attacked_with(part, groups, other):
    """One process's gradient, where `other` is what the other one adds to the gradient of the deltas."""
    model = build("small")
    strategy = create_strategy("apart", model, groups=groups)
    (statistics,) = strategy.perturbations
    own = statistics._gradient
    statistics._gradient = lambda: own() + other
    strategy.accumulate(part, lambda part: loss_fn(model, part))
    return gradients(model), own()


@pytest.mark.process
def test_two_processes(tmp_path):
    ranks = on_two_ranks(worker, tmp_path)
    for method in HYPER:
        want = reference(method, range(3), 32)
        for found in ranks:
            assert_same(found[method, "loss"], found[method, "strategy"], tolerance=0)
            for together in (False, True):
                assert_same(found[method, together], want, tolerance=1e-14)
        weights = [{name: found[method, "loss"][name] for name in want} for found in ranks]
        assert_same(*weights, tolerance=0)
    for found in ranks:
        assert_same(found["passed over"], reference("sam", [0], 16), tolerance=1e-14)
    # of the batch that does not fit, the second process takes the plain gradient, or its seven samples in one group
    parts = share(0, 16, 0), {key: value[:7] for key, value in share(1, 16, 0).items()}
    deltas = [attacked_with(part, 1, 0.0)[1] for part in parts]
    first, second = (attacked_with(part, g, delta)[0] for part, g, delta in zip(parts, (4, 1), deltas[::-1]))
    plain = build("small")
    loss_fn(plain, parts[1])[0].backward()
    for kind, other in (("plain", gradients(plain)), ("fit", second)):
        for found in ranks:
            for way in found[kind]:
                assert_same(way, {name: (first[name] + other[name]) / 2 for name in first}, tolerance=1e-14)


@pytest.fixture
def one_process(tmp_path):
    """A process group of one: DDP's hooks and buckets, without the seconds that others take."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


OPTIONS = [{}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("method", ["standard", "apart", "sam"])
def test_every_kind_of_ddp(method, options, one_process):
    """One reduction a backward, as of a plain loss, and the gradients of the network alone."""
    found = []
    for wraps in (False, True):
        model, reductions = build("small"), []
        network = DistributedDataParallel(model, **options) if wraps else model
        compute_loss = create_loss(method, network, loss_fn, **HYPER[method])
        if wraps:

            def count(_, bucket, reductions=reductions):
                reductions.append(1)
                future = torch.futures.Future()
                future.set_result(bucket.buffer())
                return future

            network.register_comm_hook(None, count)
        for k in range(3):
            compute_loss(share(0, 16, k))[0].backward()
        assert len(reductions) == (3 if wraps else 0)
        found.append(gradients(model))
    assert_same(*found, tolerance=0)


@pytest.mark.parametrize("method", ["standard", "apart", "sam"])
def test_a_loss_within_the_wrapped_module(method, one_process):
    """Trainers wrap a module that computes its own loss: the loss is then of the network in it."""

    class Task(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = build("small")
            self.compute_loss = create_loss(method, self.network, loss_fn, **HYPER[method])

        def forward(self, part):
            return self.compute_loss(part)[0]

    task, plain, reductions = Task(), build("small"), []
    wrapped = DistributedDataParallel(task)

    def count(_, bucket):
        reductions.append(1)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, count)
    compute_loss = create_loss(method, plain, loss_fn, **HYPER[method])
    for k in range(2):
        wrapped(share(0, 16, k)).backward()
        compute_loss(share(0, 16, k))[0].backward()
        assert len(reductions) == k + 1
    assert_same(gradients(task.network), gradients(plain), tolerance=0)


def test_parameters_that_a_batch_does_not_use(one_process):
    class Branches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.heads = torch.nn.BatchNorm2d(3), torch.nn.ModuleList(torch.nn.Linear(3, 5) for _ in "ab")

        def forward(self, x):
            return self.heads[int(x[0, 0, 0, 0] > 0)](self.bn(x).square().mean((2, 3)))

    model = Branches().double()
    compute_loss = create_loss("apart", DistributedDataParallel(model, find_unused_parameters=True), loss_fn, groups=2)
    part = share(0, 16, 0)
    for sign, head in ((1, 1), (-1, 0), (1, 1)):
        part["x"][0, 0, 0, 0] = sign
        model.zero_grad()
        compute_loss(part)[0].backward()
        assert model.heads[head].weight.grad.any() and model.heads[1 - head].weight.grad is None


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", ["standard", "apart", "sam"])
def test_nothing_is_left_on_the_network(method, fails, one_process):
    """Not on one whose forward stood in its __dict__ before, as accelerate leaves it, nor on its hooks."""
    for stands in (False, True):
        model, calls, hooks = build("small"), [], []
        if stands:
            own = model.forward

            def forward(x, own=own, calls=calls):
                calls.append(1)
                return own(x)

            model.forward = forward
        model.register_forward_hook(lambda module, args, output, hooks=hooks: hooks.append(args[0].shape))
        model.register_forward_pre_hook(lambda module, args, hooks=hooks: hooks.append(args[0].shape))
        wrapped = DistributedDataParallel(model)
        before = snapshot(model)

        def failing(model, part):
            if fails:
                raise RuntimeError("of the user")
            return loss_fn(model, part)

        compute_loss = create_loss(method, wrapped, failing, **HYPER[method])
        passes = 1 if method == "standard" else 2
        if fails:
            with pytest.raises(RuntimeError, match="of the user"):
                compute_loss(share(0, 16, 0))
        else:
            compute_loss(share(0, 16, 0))[0].backward()
            assert len(hooks) == 2 * passes and set(hooks) == {(8, 3, 8, 8)} and len(calls) == passes * stands
        assert snapshot(model) == before and "forward" not in wrapped.__dict__


def test_compiled_around_ddp_says_that_it_runs_uncompiled(one_process, caplog):
    model, plain = build("small"), build("small")
    compiled = torch.compile(DistributedDataParallel(model), backend="eager")
    create_loss("apart", compiled, loss_fn, groups=2)(share(0, 16, 0))[0].backward()
    assert [r.getMessage() for r in caplog.records if r.name.startswith("apart_hf")] == [
        "the model is compiled outside of DistributedDataParallel, and the two passes run uncompiled."
    ]
    create_loss("apart", plain, loss_fn, groups=2)(share(0, 16, 0))[0].backward()
    assert_same(gradients(model), gradients(plain), tolerance=0)
