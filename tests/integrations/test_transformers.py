"""transformers.Trainer with our mixin: against the strategy in a plain loop, and against the trainer as it is."""

import copy
import importlib
import logging
import os
import sys

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer_pt_utils import LabelSmoother

from apart_hf import METHODS, ApartError, create_strategy
from apart_hf.integrations.transformers import ApartMixin, ApartTrainer, ApartTrainingArguments
from apart_hf.integrations.transformers_arguments import method_options
from tests.support.helpers import assert_same, build, randomise_batchnorm, snapshot
from tests.support.loops import ADVPROP, CASES, HYPER, SCALE, batches, by_strategy, hyper_of, hyper_on_ranks, sgd
from tests.support.processes import ranks_environment
from tests.support.ranks import RANKS, on_two_ranks

COMMON = {
    "max_grad_norm": 0.0,
    "num_train_epochs": 1,
    "train_sampling_strategy": "sequential",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "logging_strategy": "no",
}


class Keywords(PreTrainedModel):
    """A network as transformers has them: it takes keywords and computes its loss."""

    def __init__(self, dtype=torch.float32):
        super().__init__(PreTrainedConfig())
        self.net = build("small", dtype=dtype)

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        return ImageClassifierOutput(None if labels is None else cross_entropy(logits, labels), logits)


class WithItems(Keywords):
    """One whose loss is a sum over the items of a step."""

    def forward(self, pixel_values, labels=None, num_items_in_batch=None, **kwargs):
        output = super().forward(pixel_values, labels)
        if labels is not None and num_items_in_batch is not None:
            output.loss = cross_entropy(output.logits, labels, reduction="sum") / num_items_in_batch
        return output


class Seeded:
    """Seeds the global generator with the number of each batch, and keeps the losses."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.losses = [*vars(self).get("losses", ()), 0.0]
        torch.manual_seed(len(self.losses) - 1)
        self.losses[-1] = super().training_step(model, inputs, *args, **kwargs).item()
        return torch.tensor(self.losses[-1])


class PlainTrainer(Seeded, Trainer):
    pass


class OurTrainer(Seeded, ApartTrainer):
    pass


@pytest.fixture
def arguments(tmp_path):
    """Makes training arguments: of a method, or of the trainer as it is."""

    def make(method=None, ratio=1, size=8, dtype=torch.float32, **more):
        kind, mine = TrainingArguments, {}
        if method is not None:
            kind, mine = ApartTrainingArguments, {f"apart_{k}": v for k, v in hyper_of(method, ratio).items()}
            mine["apart_method"] = method
        precision = {"bf16": dtype == torch.bfloat16, "per_device_train_batch_size": size}
        return kind(str(tmp_path / "output"), **COMMON | precision | mine | more)

    return make


def rows(parts):
    return [{key: value[k] for key, value in part.items()} for part in parts for k in range(len(part["labels"]))]


def made(kind, model, args, parts, **more):
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return kind(model, args, train_dataset=rows(parts), optimizers=(optimizer, scheduler), **more)


def trained(kind, model, args, parts, **more):
    trainer = made(kind, model, args, parts, **more)
    trainer.train()
    return trainer


def own_loss(model):
    return lambda part: model(**part).loss


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


AUXILIARY = {
    "advprop": {**ADVPROP, "aux_affine": True, "random_start": True},
    "fast-advprop": {"aux_affine": True},
    "advbn": {"layer": "net.conv1", "steps": 2, "aux_affine": True},
}


def normalised(dtype=torch.float32):
    model = Keywords(dtype)
    model.net.pretrained_cfg = SCALE
    return model


def auxiliary(strategy):
    return {f"own {name}": tensor for name, tensor in strategy.state_dict()["auxiliary"].items()}


@pytest.mark.parametrize("made_by", ["us", "the trainer"])
@pytest.mark.parametrize("method", AUXILIARY)
def test_an_auxiliary_gamma_and_beta_are_trained(method, made_by, arguments):
    """By an optimizer that is given, and by the trainer's own, whose groups stay as many."""
    parts, model, plain, hyper = batches(8, 8, 8), normalised(), normalised(), AUXILIARY[method]
    mine = {f"apart_{key}": value for key, value in hyper.items()}
    args = arguments(method, optim="sgd", learning_rate=0.05, lr_scheduler_type="constant", **mine)
    if made_by == "us":
        trainer = made(OurTrainer, model, args, parts)
    else:
        trainer = OurTrainer(model, args, train_dataset=rows(parts))
    trainer.train()
    strategy = create_strategy(method, plain, **hyper)
    begins = auxiliary(strategy)
    momentum = 0.9 if made_by == "us" else 0.0
    optimizer = torch.optim.SGD([*plain.parameters(), *strategy.parameters()], lr=0.05, momentum=momentum)
    for number, part in enumerate(parts):
        torch.manual_seed(number)
        strategy.accumulate(part, own_loss(plain))
        optimizer.step()
        optimizer.zero_grad()
    want = plain.state_dict() | auxiliary(strategy)
    assert_same(model.state_dict() | auxiliary(trainer.strategy), want, tolerance=0)
    assert not any(
        torch.equal(want[f"own net.bn1.{kind}"], begins[f"own net.bn1.{kind}"]) for kind in ("weight", "bias")
    )
    counts = [len(group["params"]) for group in trainer.optimizer.param_groups]
    assert sum(counts) == len(list(plain.parameters())) + 4 and len(counts) == (1 if made_by == "us" else 2)


@pytest.mark.parametrize("restores_callbacks", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("method", AUXILIARY)
def test_checkpoints_keep_auxiliary_batchnorm(method, affine, restores_callbacks, arguments, tmp_path):
    """Bit for bit, in JSON; a second call of `train` goes on with the optimizer's parameters."""
    parts = batches(*[8] * 4)
    mine = {f"apart_{key}": value for key, value in (AUXILIARY[method] | {"aux_affine": affine}).items()}
    more = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": restores_callbacks}
    args, whole, again = arguments(method, **more, **mine), normalised(), normalised()
    first = trained(ApartTrainer, whole, args, parts)
    trainer = made(ApartTrainer, again, args, parts)
    for _ in range(2):
        trainer.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-2"))
        want = whole.state_dict() | auxiliary(first.strategy)
        assert_same(again.state_dict() | auxiliary(trainer.strategy), want, tolerance=0)
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    own = list(trainer.strategy.parameters())
    assert len(own) == 4 * affine and all(any(p is one for one in held) for p in own)
    assert len(held) == len(list(again.parameters())) + len(own)


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


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation_steps": 3, "label_smoothing_factor": 0.1},
        {"max_grad_norm": 0.1, "bf16": True, "gradient_accumulation_steps": 2},
    ],
    ids=["plain", "smoothing", "clipping"],
)
@pytest.mark.parametrize("model_kind", [Keywords, WithItems])
def test_standard_is_the_trainer_as_it_is(model_kind, more, arguments):
    parts, found = batches(8, 8, 8, 8, 3), []
    for kind, method in ((PlainTrainer, None), (OurTrainer, "standard")):
        model = model_kind()
        trainer = trained(kind, model, arguments(method, logging_steps=1, logging_strategy="steps", **more), parts)
        logged = [v for entry in trainer.state.log_history[:-1] for v in entry.values()]
        found.append(model.state_dict() | {"losses": torch.tensor(trainer.losses), "logged": torch.tensor(logged)})
        evaluated = trainer.evaluate(rows(parts))
        found[-1]["evaluated"] = torch.tensor([evaluated["eval_loss"]])
    assert_same(*found, tolerance=0)


@pytest.mark.parametrize("ratio", [1, 0.5])
def test_label_smoothing(ratio, arguments):
    parts, model, plain = batches(8, 8), Keywords(), Keywords()
    trainer = trained(OurTrainer, model, arguments("apart", ratio, label_smoothing_factor=0.1), parts)
    smoother = LabelSmoother(epsilon=0.1)

    def loss_fn(part):
        return smoother(plain(part["pixel_values"]), part["labels"])

    losses = by_strategy(plain, "apart", parts, loss_fn, **hyper_of("apart", ratio))
    assert trainer.losses == losses
    assert_same(model.state_dict(), plain.state_dict(), tolerance=0)
    logits = Keywords()(parts[0]["pixel_values"]).logits.detach()
    assert losses[0] == pytest.approx(float(cross_entropy(logits, parts[0]["labels"], label_smoothing=0.1)))


def summed(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("ratio", [1, 0.5])
def test_compute_loss_func(ratio, arguments):
    parts, model, plain = batches(8, 8, dtype=torch.float64), Keywords(torch.float64), Keywords(torch.float64)
    trained(OurTrainer, model, arguments("apart", ratio), parts, compute_loss_func=summed)
    by_strategy(plain, "apart", parts, own_loss(plain), **hyper_of("apart", ratio))
    assert_same(model.state_dict(), plain.state_dict(), tolerance=1e-14)


class Counting:
    """Computes a loss of its own, logs it and collects."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, outputs = inputs.pop("labels"), model(**inputs)
        loss = 0.5 * cross_entropy(outputs.logits, labels) + outputs.logits.square().mean()
        self.log({"my_loss": loss.item()})
        self.seen = vars(self).get("seen", 0) + len(labels)
        self.collected = vars(self).get("collected", [])
        self.collected.append(loss.item())
        self.calls = vars(self).get("calls", None) or [Calls()]
        self.calls[0].count += 1
        return (loss, outputs) if return_outputs else loss


class Calls:
    count = 0


def counting_trainers():
    class Above(Counting, OurTrainer):
        pass

    class Below(Seeded, ApartMixin, Counting, Trainer):
        pass

    return {"above": Above, "below": Below}


@pytest.mark.parametrize("place", ["above", "below"])
def test_an_override_of_compute_loss(place, arguments):
    """It may stand above or below the mixin; what it logs and collects on the trainer counts once a batch."""
    parts, model, plain = batches(8, 8, 8, 8), Keywords(), Keywords()
    trainer = trained(counting_trainers()[place], model, arguments("apart", gradient_accumulation_steps=2), parts)

    def loss_fn(part):
        logits = plain(part["pixel_values"]).logits
        return 0.5 * cross_entropy(logits, part["labels"]) + logits.square().mean()

    losses = by_strategy(plain, "apart", parts, loss_fn, accumulated=2, groups=2)
    assert_same(model.state_dict(), plain.state_dict(), tolerance=1e-5)
    assert [entry["my_loss"] for entry in trainer.state.log_history if "my_loss" in entry] == trainer.collected
    assert trainer.collected == pytest.approx(losses) and trainer.seen == 32 and trainer.calls[0].count == 8
    assert "compute_loss" not in vars(trainer) and "log" not in vars(trainer)


class Failing(OurTrainer):
    fails_in_call = None

    def compute_loss(self, *args, **kwargs):
        self.calls[0].count += 1
        if self.calls[0].count == self.fails_in_call:
            raise RuntimeError("of the user")
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fails_in_call", [None, 3, 4])
def test_nothing_is_left_on_the_model(fails_in_call, dtype, arguments):
    """After a step, and an exception in either pass of the second, all is as after the preparation by accelerate."""
    parts, model = batches(8, 8), Keywords()
    trainer = made(Failing, model, arguments("apart-sam", dtype=dtype), parts)
    trainer.calls, trainer.fails_in_call, found = [Calls()], fails_in_call, []

    class Look(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            model.train()
            found.append(snapshot(model))

    trainer.add_callback(Look())
    if fails_in_call is None:
        trainer.train()
    else:
        with pytest.raises(RuntimeError, match="of the user"):
            trainer.train()
    assert [snapshot(model)] == found and "compute_loss" not in vars(trainer) and "log" not in vars(trainer)


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


@pytest.mark.parametrize("restores_callbacks", [False, True])
@pytest.mark.parametrize("method, kept", [("apart", 3), ("random-bn", 6)])
def test_the_trainer_s_checkpoints_keep_the_state(method, kept, restores_callbacks, arguments, tmp_path):
    """Cut off within an epoch of 6 steps and at its end, within `every`, with ratio below 1 and shuffled data."""
    parts = batches(*[8] * 6)
    more = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": kept, "train_sampling_strategy": "random"}
    args = arguments(method, 0.5, apart_every=2, restore_callback_states_from_checkpoint=restores_callbacks, **more)
    whole, again = Keywords(), Keywords()
    trained(ApartTrainer, whole, args, parts)
    trainer = made(ApartTrainer, again, args, parts)
    trainer.train(resume_from_checkpoint=str(tmp_path / "output" / f"checkpoint-{kept}"))
    assert_same(again.state_dict(), whole.state_dict(), tolerance=0)
    trainer.train(resume_from_checkpoint=str(tmp_path / "output" / f"checkpoint-{kept}"))  # by the same trainer
    assert_same(again.state_dict(), whole.state_dict(), tolerance=0)


def test_checkpoints_of_the_trainer_as_it_is(arguments, tmp_path):
    """One of a plain trainer is gone on from by ours, and ours by a plain one; another method's is refused."""
    parts, saves = batches(8, 8, 8, 8), {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    checkpoint = str(tmp_path / "output" / "checkpoint-{}")
    trained(Trainer, Keywords(), arguments(**saves), parts)
    trainer = made(ApartTrainer, Keywords(), arguments("sam", **saves | {"max_steps": 3}), parts)
    assert trainer.train(resume_from_checkpoint=checkpoint.format(2)).global_step == 3
    plain = made(Trainer, Keywords(), arguments(**saves | {"max_steps": 4}), parts)
    assert plain.train(resume_from_checkpoint=checkpoint.format(3)).global_step == 4
    other = made(ApartTrainer, Keywords(), arguments("apart", **saves | {"max_steps": 4}), parts)
    with pytest.raises(ApartError, match="load the state of a strategy of the same method"):
        other.train(resume_from_checkpoint=checkpoint.format(3))


def test_resuming_with_other_values_is_said_once(arguments, tmp_path, caplog):
    """In one line; what the run itself had set goes on without one."""

    class Scheduled(ApartTrainer):
        def training_step(self, *args, **kwargs):
            self.strategy.set(epsilon=0.05)
            return super().training_step(*args, **kwargs)

    parts, saves = batches(8, 8, 8), {"save_strategy": "steps", "save_steps": 1}
    checkpoint = str(tmp_path / "output" / "checkpoint-2")
    trained(Scheduled, Keywords(), arguments("apart", apart_epsilon=0.1, max_steps=2, **saves), parts)
    for epsilon, count in ((0.1, 0), (0.4, 1)):
        caplog.clear()
        trainer = made(ApartTrainer, Keywords(), arguments("apart", apart_epsilon=epsilon, max_steps=3), parts)
        trainer.train(resume_from_checkpoint=checkpoint)
        said = [record.getMessage() for record in caplog.records if "goes on with" in record.getMessage()]
        assert len(said) == count and trainer.strategy.hyper["epsilon"] == 0.05 and trainer.strategy.steps == 3
    assert "goes on with epsilon=0.05, as its saved state has it, and not with epsilon=0.4, as given" in said[0]


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


def test_arguments_are_flags(capsys):
    flags = "--output_dir output --apart_method apart-asam --apart_epsilon 0.2 --apart_groups 4 --apart_ratio 0.5"
    flags += " --apart_rho 0.3 --apart_eta 0.02 --apart_every 2 --apart_uneven plain"
    parser = HfArgumentParser(ApartTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(flags.split())
    assert (
        vars(args).items()
        >= {
            "apart_method": "apart-asam",
            "apart_epsilon": 0.2,
            "apart_groups": 4,
            "apart_ratio": 0.5,
            "apart_rho": 0.3,
            "apart_eta": 0.02,
            "apart_every": 2,
            "apart_uneven": "plain",
        }.items()
    )
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    said = capsys.readouterr().out
    assert "Radius of the perturbation of BatchNorm's statistics" in said and "--apart_uneven {error,plain,fit}" in said
    assert all(method in said for method in HYPER)
    with pytest.raises(SystemExit):  # argparse's own line rather than a traceback
        parser.parse_args_into_dataclasses(["--output_dir", "output", "--apart_method", "aprat"])
    said = capsys.readouterr().err
    assert "argument --apart_method/--apart-method: invalid choice: 'aprat'" in said and "'apart-sam'" in said
    again = parser.parse_dict(args.to_dict() | {"output_dir": "output"})[0]
    assert again.apart_rho == 0.3


OPTIONS = [(method, key) for method, one in METHODS.items() for key, v in one.hyper_parameters().items() if v is False]


@pytest.mark.parametrize("method, option", OPTIONS)
def test_every_option_is_a_flag_that_is_off(method, option):
    """And every number is one; an option that a method lacks is refused only where it is on."""
    fields = ApartTrainingArguments.__dataclass_fields__
    assert all(f"apart_{key}" in fields for key in METHODS[method].hyper_parameters())
    parser = HfArgumentParser(ApartTrainingArguments)
    flags = ["--output_dir", "output", "--apart_method", method]
    (off,), (on,) = (parser.parse_args_into_dataclasses(flags + more) for more in ([], [f"--apart_{option}"]))
    assert option not in method_options(off) and method_options(on)[option] is True
    with pytest.raises(ApartError, match=f"method 'standard' has no hyper-parameter '{option}'"):
        parser.parse_args_into_dataclasses([*flags[:-1], "standard", f"--apart_{option}"])


def test_bad_input(arguments):
    parts = batches(8)
    with pytest.raises(ApartError, match="did you mean 'apart'"):
        arguments("sam", apart_method="aprat", apart_rho=None)
    with pytest.raises(ApartError, match="method 'sam' has no hyper-parameter 'groups'; it has rho, global_norm"):
        arguments("sam", apart_groups=4)
    with pytest.raises(ApartError, match=r"\(TrainingArguments\) have no apart_method; use ApartTrainingArguments"):
        ApartTrainer(Keywords(), arguments())
    for wrong, said in (
        ({"apart_epsilon": -1.0}, "epsilon=-1.0: the radius must be a finite number >= 0"),
        ({"apart_ratio": 2.0}, "ratio=2.0: N/M"),
        ({"apart_every": 0}, "every=0: the second pass"),
        ({"apart_uneven": "maybe"}, "uneven='maybe': choose"),
    ):
        with pytest.raises(ApartError, match=said):
            ApartTrainer(Keywords(), arguments("apart", **wrong))
    model = Keywords()
    model.net.bn2 = type("FrozenBatchNorm", (nn.BatchNorm2d,), {"forward": lambda self, x: x})(8)
    with pytest.raises(ApartError, match=r"BatchNorm layer 'net\.bn2' is a FrozenBatchNorm"):
        ApartTrainer(model, arguments("apart"))
    for wrong in (torch.optim.SGD(Keywords().parameters(), lr=0.1), "resnet18"):
        for how in ({"model": wrong, "args": arguments("apart")}, None):
            with pytest.raises(ApartError, match=r"a strategy is made for a model .* pass the model"):
                ApartTrainer(**how) if how else ApartTrainer(wrong, arguments("apart"))
    with pytest.raises(ApartError, match="names ApartMixin after a trainer"):
        type("Late", (Trainer, ApartMixin), {})

    class Lonely(ApartTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

    with pytest.raises(ApartError, match=r"does not call super\(\)\.training_step"):
        trained(Lonely, Keywords(), arguments("apart"), parts)

    class WithWeights(ApartTrainer):
        def get_batch_samples(self, *args):
            samples, items = super().get_batch_samples(*args)
            return [part | {"class_weights": torch.ones(5)} for part in samples], items

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            weights = inputs.pop("class_weights")
            return cross_entropy(model(inputs["pixel_values"]).logits, inputs["labels"], weights)

    with pytest.raises(ApartError, match=r"5 and 8 rows, .* override count_samples\(inputs\) of the trainer"):
        trained(WithWeights, Keywords(), arguments("apart", 0.5), parts)
    WithWeights.count_samples = lambda self, inputs: len(inputs["labels"])
    model, plain = Keywords(), Keywords()
    WithWeights.__bases__ = (OurTrainer,)
    trained(WithWeights, model, arguments("apart", 0.5), parts)
    by_strategy(plain, "apart", parts, own_loss(plain), groups=2, ratio=0.5)
    assert_same(model.state_dict(), plain.state_dict(), tolerance=0)


@pytest.mark.parametrize("ratio", [1, 0.5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_labels_in_a_list_go_with_their_images(layout, ratio, arguments):
    class Named(Keywords):
        def forward(self, pixel_values, names=None):
            return super().forward(pixel_values, torch.tensor([int(name) for name in names]))

    def collated(items):
        images = torch.stack([item["pixel_values"] for item in items]).contiguous(memory_format=layout)
        return {"pixel_values": images, "names": [str(int(item["labels"])) for item in items]}

    parts = batches(8, 8)
    shaped = [part | {"pixel_values": part["pixel_values"].contiguous(memory_format=layout)} for part in parts]
    plain = Keywords().to(memory_format=layout)
    by_strategy(plain, "apart", shaped, own_loss(plain), groups=4, ratio=ratio)
    model = Named().to(memory_format=layout)
    args = arguments("apart", ratio, apart_groups=4, remove_unused_columns=False)
    trained(OurTrainer, model, args, parts, data_collator=collated)
    assert_same(model.state_dict(), plain.state_dict(), tolerance=1e-5)


def test_without_transformers(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("apart_hf.integrations.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for kind in (ApartError, ImportError):
        with pytest.raises(kind, match=r"^transformers is not installed; pip install 'apart-hf\[transformers\]'\.$"):
            importlib.import_module("apart_hf.integrations.transformers")
