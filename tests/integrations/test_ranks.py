"""timm's task and accelerate's loop in two processes, against the strategy in a plain loop under DDP."""

import copy
import os
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from timm.task import ClassificationTask
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from apart_hf import create_loss
from apart_hf.integrations.timm import apart
from tests.support.helpers import assert_same, batch, build, forget_accelerator
from tests.support.loops import HYPER, by_strategy, hyper_of, sgd
from tests.support.processes import ranks_environment
from tests.support.ranks import RANKS, on_two_ranks


def loss_fn(model, part):
    return cross_entropy(model(part[0]), part[1])


def by_timm(model, parts, method, accumulated, options):
    """As timm's script does it: the loss is divided, and gradients are reduced with the last batch of a step."""
    task = apart(ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False), method, **options)
    task.prepare_distributed()
    wrapped, optimizer, losses = task.get_trainable_module(), sgd(model), []
    for number, (x, y) in enumerate(parts, start=1):
        torch.manual_seed(number - 1)
        is_last = number % accumulated == 0
        with nullcontext() if is_last else wrapped.no_sync():
            loss = task(x, y)["loss"]
            losses.append(loss.item())
            (loss / accumulated).backward()
        if is_last:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def by_accelerate(model, parts, method, accumulated, options):
    forget_accelerator()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    wrapped, optimizer = accelerator.prepare(model, sgd(model))
    assert accelerator.num_processes == RANKS and isinstance(wrapped, DistributedDataParallel)
    compute_loss, losses = create_loss(method, wrapped, loss_fn, **options), []
    for number, part in enumerate(parts):
        torch.manual_seed(number)
        with accelerator.accumulate(wrapped):
            loss = compute_loss(part, ends_step=accelerator.sync_gradients)
            losses.append(loss.item())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert compute_loss.strategy.steps == len(parts) // accumulated
    return losses


def on_rank(rank, folder, environments):
    os.environ.update(environments[rank])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for method in HYPER:
        for accumulated in (1, 2):
            dtype = torch.float32 if accumulated == 1 else torch.float64
            parts = [batch(8, 16, seed=k, dtype=dtype) for k in range(8)][rank::RANKS]
            options = hyper_of(method, 0.5 if "groups" in HYPER[method] else 1)
            for way in (by_timm, by_accelerate):
                draws = [{"generator": torch.Generator().manual_seed(rank)} for _ in range(2)]
                model, plain = build("small", dtype=dtype), build("small", dtype=dtype)
                wrapped = DistributedDataParallel(plain)
                own_loss = lambda part, wrapped=wrapped: loss_fn(wrapped, part)  # noqa: E731
                expected = by_strategy(wrapped, method, parts, own_loss, accumulated=accumulated, **draws[0], **options)
                losses = way(model, parts, method, accumulated, draws[1] | options)
                found[way.__name__, method, accumulated] = losses, expected, model.state_dict(), plain.state_dict()
    torch.save(copy.deepcopy(found), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.process
def test_two_processes(tmp_path):
    """Bit-equal under DDP, and within 1e-14 with accumulation in float64."""
    one, other = on_two_ranks(on_rank, tmp_path, ranks_environment(RANKS), forked_here=True)
    assert len(one) == 4 * len(HYPER)
    for key, (losses, expected, model, plain) in [*one.items(), *other.items()]:
        if key[2] == 1:
            assert losses == expected, key
        assert losses == pytest.approx(expected, rel=1e-14), key
        assert_same(model, plain, tolerance=0 if key[2] == 1 else 1e-14)
    for key in one:  # the weights of both are one model; running statistics are each process's own
        names = [name for name in one[key][2] if name.endswith(("weight", "bias"))]
        assert all(torch.equal(one[key][2][name], other[key][2][name]) for name in names), key
