"""transformers.Trainer with our mixin against the strategy in a plain loop."""

import copy
import logging
import os

import pytest
import torch
import torch.distributed as dist
import transformers
from transformers import TrainerCallback

from apart_hf import ApartError, create_strategy
from apart_hf.integrations.transformers import ApartTrainer, ApartTrainingArguments
from tests.support.helpers import assert_same, randomise_batchnorm
from tests.support.loops import ADVPROP, CASES, HYPER, SCALE, batches, by_strategy, hyper_of, hyper_on_ranks, sgd
from tests.support.processes import ranks_environment
from tests.support.ranks import RANKS, on_two_ranks
from tests.support.transformers_trainer import (
    COMMON,
    Keywords,
    OurTrainer,
    WithItems,
    made,
    normalised,
    own_loss,
    trained,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method, ratio", CASES)
def test_bit_equal_to_the_strategy_in_a_plain_loop(method, ratio, dtype, arguments):
    parts, model, plain = batches(8, 8, 8), Keywords(), Keywords()
    trainer = trained(OurTrainer, model, arguments(method, ratio, dtype=dtype), parts)
    losses = by_strategy(
        plain, method, parts, own_loss(plain), bfloat16=dtype == torch.bfloat16, **hyper_of(method, ratio)
    )
    assert trainer.losses == losses
    assert_same(model.state_dict(), plain.state_dict(), tolerance=0)


def test_images_are_moved(arguments):
    """By the scale that a part of the model tells, as timm's within TimmWrapper does."""
    parts, model, plain = batches(8, 8), Keywords(), Keywords()
    model.net.pretrained_cfg = SCALE
    mine = {f"apart_{key}": value for key, value in ADVPROP.items()}
    trainer = trained(OurTrainer, model, arguments("advprop", **mine), parts)
    assert trainer.losses == by_strategy(plain, "advprop", parts, own_loss(plain), **ADVPROP, **SCALE)
    assert_same(model.state_dict(), plain.state_dict(), tolerance=0)


@pytest.mark.parametrize("accumulated", [2, 3])
@pytest.mark.parametrize("method, ratio", CASES)
def test_accumulation_with_a_rest(method, ratio, accumulated, arguments):
    """Five batches in float64, the loss once a mean that the trainer divides, and once a sum that it counts for."""
    parts = batches(8, 8, 8, 8, 8, dtype=torch.float64)
    plain = Keywords(torch.float64)
    by_strategy(plain, method, parts, own_loss(plain), accumulated=accumulated, **hyper_of(method, ratio))
    for kind in (Keywords, WithItems):
        model, args = kind(torch.float64), arguments(method, ratio, gradient_accumulation_steps=accumulated)
        trainer = trained(OurTrainer, model, args, parts)
        assert trainer.model_accepts_loss_kwargs == (kind is WithItems)
        assert_same(model.state_dict(), plain.state_dict(), tolerance=1e-14)


@pytest.mark.parametrize("last", [1, 7, 2])
def test_last_batches_of_any_size(last, arguments, caplog):
    parts, model, plain = batches(8, 8, last), Keywords(), Keywords()
    with caplog.at_level(logging.WARNING, logger="apart_hf"):
        trainer = trained(OurTrainer, model, arguments("apart", apart_groups=4), parts)
    assert caplog.text.count("Further batches that do not fit") == 1
    losses = by_strategy(plain, "apart", parts, own_loss(plain), groups=4, uneven="fit")
    assert trainer.losses == losses
    assert_same(model.state_dict(), plain.state_dict(), tolerance=0)
    with pytest.raises(ApartError, match=rf"groups=4 does not divide the {last} samples"):
        trained(ApartTrainer, Keywords(), arguments("apart", apart_groups=4, apart_uneven="error"), parts)


def test_every_counts_steps_of_the_optimizer(arguments):
    parts, model, plain = batches(*[8] * 8, dtype=torch.float64), Keywords(torch.float64), Keywords(torch.float64)
    args = arguments("apart-sam", apart_every=2, gradient_accumulation_steps=2)
    trained(OurTrainer, model, args, parts)
    by_strategy(plain, "apart-sam", parts, own_loss(plain), accumulated=2, every=2, **HYPER["apart-sam"])
    assert_same(model.state_dict(), plain.state_dict(), tolerance=1e-14)


def test_a_schedule(arguments):
    """A callback sets epsilon from the first step on; the strategy is there in training and after it."""
    parts, epsilons, found = batches(8, 8, 8), [0.05, 0.2, 0.4], []

    class Schedule(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.trainer.strategy.set(groups=4)

        def on_step_begin(self, args, state, control, **kwargs):
            self.trainer.strategy.set(epsilon=epsilons[state.global_step])

        def on_step_end(self, *args, **kwargs):
            found.append(str(self.trainer.strategy))

    model, plain, schedule = Keywords(), Keywords(), Schedule()
    trainer = schedule.trainer = made(OurTrainer, model, arguments("apart"), parts, callbacks=[schedule])
    with pytest.raises(ApartError, match="once train has begun"):
        _ = trainer.strategy
    trainer.train()
    assert found == [f"apart(epsilon={epsilon}, groups=4, ratio=1.0)" for epsilon in epsilons]
    strategy, optimizer = create_strategy("apart", plain, groups=4), sgd(plain)
    for epsilon, part in zip(epsilons, parts):
        strategy.set(epsilon=epsilon)
        strategy.accumulate(part, own_loss(plain))
        optimizer.step()
        optimizer.zero_grad()
    assert_same(model.state_dict(), plain.state_dict(), tolerance=0)
    assert trainer.strategy.steps == 3


FAMILIES = {  # as small as they get
    "TimmWrapper": {"architecture": "test_resnet"},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "RegNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
    "MobileNetV2": {"image_size": 32, "depth_multiplier": 0.25, "finegrained_output": False},
}


MORE_FAMILIES = {
    "MobileNetV1": {"image_size": 32, "depth_multiplier": 0.25},
    "EfficientNet": {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
    "MobileViT": {"image_size": 32, "hidden_sizes": [16] * 3, "neck_hidden_sizes": [8] * 6 + [16]},
    "MobileViTV2": {"image_size": 64, "width_multiplier": 0.1},
    "Levit": {"image_size": 64, "hidden_sizes": [16] * 3, "num_attention_heads": [1] * 3, "key_dim": [8] * 3},
    "SwiftFormer": {"image_size": 32, "depths": [1] * 4, "embed_dims": [8, 8, 16, 16]},
    "Cvt": {"embed_dim": [8, 8, 16], "num_heads": [1] * 3, "depth": [1, 2, 3]},
    "TextNet": {"stem_out_channels": 8, "hidden_sizes": [8] * 5},
}


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_FAMILIES)])
def test_models_of_transformers(family, arguments):
    """Bit-equal in a step, also for those of the accelerator's keyword arguments; their BN layers are torch's own."""
    configuration, kind = (
        getattr(transformers, f"{family}Config"),
        getattr(transformers, f"{family}ForImageClassification"),
    )
    known = (FAMILIES | MORE_FAMILIES)[family]
    torch.manual_seed(0)
    model = randomise_batchnorm(kind(configuration(num_labels=5, **known)))
    plain = copy.deepcopy(model).train()
    size = known.get("image_size", 32)
    part = {"pixel_values": torch.randn(8, 3, size, size), "labels": torch.arange(8) % 5}
    trainer = trained(OurTrainer, model, arguments("apart-sam", 0.5), [part])
    assert trainer.losses == by_strategy(plain, "apart-sam", [part], own_loss(plain), **hyper_of("apart-sam", 0.5))
    assert_same(model.state_dict(), plain.state_dict(), tolerance=0)


def on_rank(rank, folder, environments):
    """Two batches each in two processes, by the trainer, and by the strategy in a plain loop."""
    os.environ.update(environments[rank])
    torch.set_num_threads(1)
    found = {}
    for method, accumulated in (("standard", 1), ("apart", 1), ("apart-sam", 1), ("apart-sam", 2), ("advprop", 1)):
        dtype = torch.float32 if accumulated == 1 else torch.float64
        parts, model = batches(8, 8, 8, 8, dtype=dtype), normalised(dtype)
        hyper = hyper_on_ranks(method)
        mine = {f"apart_{key}": value for key, value in hyper.items()} | {"apart_method": method}
        args = ApartTrainingArguments(str(folder), **COMMON | mine, gradient_accumulation_steps=accumulated)
        trainer = trained(OurTrainer, model, args, parts)
        assert args.parallel_mode.value == "distributed" and args.world_size == 2
        plain = normalised(dtype)
        wrapped = torch.nn.parallel.DistributedDataParallel(plain)
        own = parts[rank::2]
        losses = by_strategy(wrapped, method, own, own_loss(wrapped), accumulated=accumulated, **hyper)
        found[method, accumulated] = trainer.losses, losses, model.state_dict(), plain.state_dict()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.process
def test_two_processes(tmp_path):
    """Bit-equal under DDP, and within 1e-14 with accumulation in float64."""
    for found in on_two_ranks(on_rank, tmp_path, ranks_environment(RANKS), forked_here=True):
        for (_, accumulated), (losses, expected, model, plain) in found.items():
            assert losses == [loss / accumulated for loss in expected]  # as the trainer says them
            assert_same(model, plain, tolerance=0 if accumulated == 1 else 1e-14)
