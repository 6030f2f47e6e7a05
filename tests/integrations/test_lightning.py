"""Lightning's Trainer with our callback: against the strategy in a plain loop, and against the Trainer as it is."""

import copy
import logging
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from apart_hf import ApartError, create_strategy
from apart_hf.integrations.lightning import Apart
from tests.support.helpers import assert_same, build
from tests.support.lightning_trainer import Calls, Memory, Module, fit, loaders, own_loss, trainer_of
from tests.support.loops import ADVPROP, CASES, HYPER, SCALE, batches, by_strategy, hyper_of, hyper_on_ranks, sgd
from tests.support.processes import ranks_environment
from tests.support.ranks import RANKS, on_two_ranks

pytestmark = pytest.mark.usefixtures("quiet_lightning")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method, ratio", CASES)
def test_bit_equal_to_the_strategy_in_a_plain_loop(method, ratio, precision):
    parts, module, plain = batches(8, 8, 8), Module(), build("small", dtype=torch.float32)
    fit(module, parts, Apart(method, **hyper_of(method, ratio)), precision=precision)
    mixed = precision == "bf16-mixed"
    losses = by_strategy(plain, method, parts, own_loss(plain), bfloat16=mixed, **hyper_of(method, ratio))
    assert module.said == losses
    assert_same(module.net.state_dict(), plain.state_dict(), tolerance=0)


def test_images_are_moved():
    parts, module, plain = batches(8, 8), Module(), build("small", dtype=torch.float32)
    fit(module, parts, Apart("advprop", **ADVPROP, **SCALE))
    losses = by_strategy(plain, "advprop", parts, own_loss(plain), **ADVPROP, **SCALE)
    assert module.said == losses
    assert_same(module.net.state_dict(), plain.state_dict(), tolerance=0)


@pytest.mark.parametrize("accumulated", [2, 3])
@pytest.mark.parametrize("method, ratio", CASES)
def test_accumulation_with_a_rest(method, ratio, accumulated):
    """Five batches in float64; Lightning divides by the same number in the last step, which has fewer."""
    parts, module, plain = batches(*[8] * 5, dtype=torch.float64), Module(torch.float64), build("small")
    hyper = hyper_of(method, ratio)
    fit(module, parts, Apart(method, **hyper), accumulate_grad_batches=accumulated)
    by_strategy(plain, method, parts, own_loss(plain), accumulated=accumulated, counted=accumulated, **hyper)
    assert_same(module.net.state_dict(), plain.state_dict(), tolerance=1e-14)


class Overflowing(Module):
    """Gives an infinite loss in one call of its training_step; None: in none."""

    def __init__(self, in_call):
        super().__init__()
        self.in_call, self.calls = in_call, Calls()

    def training_step(self, batch, batch_idx):
        self.calls.count += 1
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if self.calls.count == self.in_call else loss


@pytest.mark.parametrize("in_call", [None, 1, 2])
@pytest.mark.parametrize("method", ["apart", "sam", "apart-sam"])
def test_a_gradient_scaler_on_the_cpu(method, in_call):
    """In float16: an overflow in either pass skips the step and halves the factor; the next one trains on."""
    parts, module, plain = batches(8, 8), Overflowing(in_call), build("small", dtype=torch.float32)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=2.0**10), copy.deepcopy(module.net.state_dict())
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            names = ("fc.weight", "conv1.weight")
            seen.append(all(torch.equal(module.net.state_dict()[name], before[name]) for name in names))

    precision = MixedPrecision("16-mixed", "cpu", scaler)
    fit(module, parts, Apart(method, **HYPER[method]), Watch(), plugins=[precision])
    assert seen == [in_call is not None, False] and scaler.get_scale() == 2.0 ** (10 if in_call is None else 9)
    if in_call is not None:  # running statistics have seen the batch
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            plain(parts.pop(0)["pixel_values"])
    strategy = create_strategy(method, plain, autocast=partial(torch.autocast, "cpu", torch.float16), **HYPER[method])
    optimizer = sgd(plain)
    for part in parts:
        strategy.accumulate(part, own_loss(plain), backward=lambda loss: (loss * 2.0**12).backward())
        for p in plain.parameters():
            p.grad /= 2.0**12
        optimizer.step()
        optimizer.zero_grad()
    assert_same(module.net.state_dict(), plain.state_dict(), tolerance=0.02)  # float16 has three digits


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
    ],
    ids=["plain", "clipping", "bfloat16"],
)
def test_standard_is_the_trainer_as_it_is(more):
    parts, found, logged = batches(8, 8, 8, 8, 3), [], []
    for callbacks in ([], [Apart("standard")]):
        module, memory = Module(), Memory()
        trainer = trainer_of(*callbacks, **more | {"logger": memory})
        trainer.fit(module, loaders(parts), loaders(parts))
        evaluated = trainer.validate(module, loaders(parts), verbose=False)[0]["eval_loss"]
        numbers = {"said": torch.tensor(module.said), "evaluated": torch.tensor(evaluated)}
        found.append(module.state_dict() | numbers)
        logged.append(memory.lines)
    assert_same(*found, tolerance=0)
    assert logged[0] == logged[1] and len(logged[0]) >= 5


@pytest.mark.parametrize("last", [1, 7, 2])
def test_last_batches_of_any_size(last, caplog):
    parts, module, plain = batches(8, 8, last), Module(), build("small", dtype=torch.float32)
    with caplog.at_level(logging.WARNING, logger="apart_hf"):
        fit(module, parts, Apart("apart", groups=4))
    assert caplog.text.count("Further batches that do not fit") == 1
    assert module.said == by_strategy(plain, "apart", parts, own_loss(plain), groups=4, uneven="fit")
    assert_same(module.net.state_dict(), plain.state_dict(), tolerance=0)
    with pytest.raises(ApartError, match=rf"groups=4 does not divide the {last} samples"):
        fit(Module(), parts, Apart("apart", groups=4, uneven="error"))


def test_every_counts_steps_of_the_optimizer():
    """Three steps an epoch, the last of them of one batch, and the second pass in each other one."""
    parts, module, plain = batches(*[8] * 5, dtype=torch.float64), Module(torch.float64), build("small")
    apart = Apart("apart-sam", every=2, **HYPER["apart-sam"])
    fit(module, parts, apart, accumulate_grad_batches=2)
    options = {"accumulated": 2, "counted": 2, "every": 2}
    by_strategy(plain, "apart-sam", parts, own_loss(plain), **options, **HYPER["apart-sam"])
    assert_same(module.net.state_dict(), plain.state_dict(), tolerance=1e-14)
    assert apart.strategy.steps == 3
    apart.strategy.set(epsilon=0.05)
    fit(module, parts, apart)  # goes on counting, with what was set
    assert apart.strategy.steps == 8 and apart.strategy.hyper["epsilon"] == 0.05


def ddp_of_gloo():
    return DDPStrategy(process_group_backend="gloo")


def on_rank(rank, folder, environments):
    """Two steps in two processes, by the Trainer, and by the strategy in a plain loop."""
    os.environ.update(environments[rank] | {"NODE_RANK": "0"})
    torch.set_num_threads(1)
    found = {}
    for method, accumulated in (("standard", 1), ("apart", 1), ("apart-sam", 1), ("apart-sam", 2), ("advprop", 1)):
        dtype = torch.float32 if accumulated == 1 else torch.float64
        parts, module, plain = batches(8, 8, 8, 8, dtype=dtype)[rank::2], Module(dtype), build("small", dtype=dtype)
        hyper = hyper_on_ranks(method) | (SCALE if method == "advprop" else {})
        more = {
            "devices": 2,
            "strategy": ddp_of_gloo(),
            "use_distributed_sampler": False,
            "accumulate_grad_batches": accumulated,
        }
        apart = Apart(method, generator=torch.Generator().manual_seed(rank), **hyper)
        trainer = fit(module, parts, apart, **more)
        trainer.save_checkpoint(folder / "kept.ckpt")
        assert trainer.world_size == 2 and apart.strategy.steps == 2 // accumulated
        if method != "standard":  # a state for each process
            again = Apart(method, generator=torch.Generator(), **hyper)
            fit(Module(dtype), parts, again, path=folder / "kept.ckpt", **more | {"strategy": ddp_of_gloo()})
            assert torch.equal(again.generator.get_state(), apart.generator.get_state())
            assert again.strategy.steps == apart.strategy.steps
        wrapped = DistributedDataParallel(plain)
        options = {"generator": torch.Generator().manual_seed(rank), "accumulated": accumulated}
        losses = by_strategy(wrapped, method, parts, own_loss(wrapped), **options, **hyper)
        found[method, accumulated] = module.said, losses, module.net.state_dict(), plain.state_dict()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.process
def test_two_processes(tmp_path):
    """Bit-equal under DDP, and within 1e-14 with accumulation in float64."""
    for found in on_two_ranks(on_rank, tmp_path, ranks_environment(RANKS), forked_here=True):
        for (_, accumulated), (losses, expected, model, plain) in found.items():
            assert losses == [loss / accumulated for loss in expected]
            assert_same(model, plain, tolerance=0 if accumulated == 1 else 1e-14)
