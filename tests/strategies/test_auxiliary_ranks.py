"""Two processes (gloo, CPU) whose strategies hold a gamma and beta: the mean of the oracle's gradients on both."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from apart_hf import create_loss, create_strategy
from tests.reference import reference_images_step
from tests.support.helpers import assert_same, batch, build, gradients
from tests.support.oracle import SCALE
from tests.support.ranks import RANKS, on_two_ranks, start_rank

HYPER = {
    "advprop": {"steps": 2, "random_start": True, "aux_affine": True},
    "fast-advprop": {"ratio": 0.5, "aux_affine": True},
}
WAYS = ["strategy", "loss"]


def part(rank, seed):
    return tuple(one.chunk(RANKS)[rank] for one in batch(16, 12, seed=seed))


def worker(rank, folder):
    """Two micro-batches, of which the second is synchronised, by each method and way."""
    start_rank(rank, folder)
    found = {}
    for method, hyper in HYPER.items():
        for way in WAYS:
            model = build("small")
            wrapped = DistributedDataParallel(model)
            options = {"generator": torch.Generator().manual_seed(7 + rank), **SCALE, **hyper}
            if way == "strategy":
                strategy = create_strategy(method, wrapped, **options)
                step = lambda data, s=strategy: s.accumulate_gradients(*data, cross_entropy)  # noqa: E731
            else:
                compute_loss = create_loss(method, wrapped, lambda m, b: cross_entropy(m(b[0]), b[1]), **options)
                strategy = compute_loss.strategy
                step = lambda data, c=compute_loss: c(data).backward()  # noqa: E731
            for k in range(2):
                with nullcontext() if k else wrapped.no_sync():
                    step(part(rank, k))
            held = {name: p.grad for name, p in strategy.perturbations[1].named_parameters()}
            state = strategy.state_dict()["auxiliary"]
            found[method, way] = copy.deepcopy((gradients(model), held, state))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def oracle(method, rank):
    """Both micro-batches of a rank, one after the other: sums of gradients, and what is held in the end."""
    generator, auxiliary, sums = torch.Generator().manual_seed(7 + rank), None, ({}, {})
    for k in range(2):
        *found, auxiliary = reference_images_step(
            build("small"),
            *part(rank, k),
            cross_entropy,
            method,
            auxiliary=auxiliary,
            generator=generator,
            **SCALE,
            **HYPER[method],
        )
        for total, new in zip(sums, (found[0], found[2])):
            total.update({name: total.get(name, 0) + g for name, g in new.items()})
    return *sums, auxiliary


@pytest.mark.process
def test_two_ranks_average_what_the_strategy_holds(tmp_path):
    ranks = on_two_ranks(worker, tmp_path)
    for method in HYPER:
        own = [oracle(method, rank) for rank in range(RANKS)]
        want = [{name: (a[name] + b[name]) / 2 for name in a} for a, b in zip(own[0][:2], own[1][:2])]
        for way in WAYS:
            for rank, found in enumerate(ranks):
                shared, held, state = found[method, way]
                assert_same(shared, want[0])
                assert_same(held, want[1])
                floats = {name: t for name, t in own[rank][2].items() if t.is_floating_point()}
                assert_same({name: state[name] for name in floats}, floats)
            for one, other in zip(*(found[method, way][:2] for found in ranks)):
                assert all(torch.equal(one[name], other[name]) for name in one)
