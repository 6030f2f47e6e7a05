"""Lightning's Trainer with our callback: against the strategy in a plain loop, and against the Trainer as it is."""

import copy
import importlib
import logging
import os
import sys
import warnings
from collections import Counter, OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Accuracy, MeanMetric, MetricCollection, Precision

from apart_hf import ApartError, create_strategy
from apart_hf.integrations.lightning import Apart
from tests.support.helpers import assert_same, build, snapshot
from tests.support.loops import ADVPROP, CASES, HYPER, SCALE, batches, by_strategy, hyper_of, hyper_on_ranks, sgd
from tests.support.processes import ranks_environment
from tests.support.ranks import RANKS, on_two_ranks


class Module(LightningModule):
    """Seeds the global generator with the number of each batch, and keeps the losses."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.net, self.said = build("small", dtype=dtype), []

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(batch_idx)

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.net(batch["pixel_values"]), batch["labels"])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("eval_loss", cross_entropy(self.net(batch["pixel_values"]), batch["labels"]), batch_size=8)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if outputs:
            self.said.append(outputs["loss"].item())

    def configure_optimizers(self):
        return sgd(self.net)


class Resumable:
    """A loader that goes on where it was, as Lightning asks of one within an epoch."""

    def __init__(self, parts):
        self.parts, self.next = parts, 0

    def __len__(self):
        return len(self.parts)

    def __iter__(self):
        torch.empty(()).random_()  # as a DataLoader does
        self.next %= len(self.parts)
        while self.next < len(self.parts):
            self.next += 1
            yield self.parts[self.next - 1]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def loaders(parts, **more):
    return torch.utils.data.DataLoader(parts, batch_size=None, **more)


def trainer_of(*callbacks, **more):
    options = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "log_every_n_steps": 1}
    options |= {f"enable_{part}": False for part in ("checkpointing", "progress_bar", "model_summary")}
    return Trainer(callbacks=list(callbacks), **options | more)


def fit(module, parts, *callbacks, path=None, shuffle=False, resumable=False, **more):
    trainer = trainer_of(*callbacks, **more)
    trainer.fit(module, Resumable(parts) if resumable else loaders(parts, shuffle=shuffle), ckpt_path=path)
    assert "training_step" not in vars(trainer.strategy)
    return trainer


@pytest.fixture(autouse=True)
def quietly():
    """Lightning's advice on small data is not heard."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        yield


def own_loss(net):
    return lambda part: cross_entropy(net(part["pixel_values"]), part["labels"])


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


class Scheduled(Module):
    """Has a scheduler, and normalisation layers in a group of their own."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(by_groups(self.net), lr=0.05, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]


def by_groups(net, own=()):
    """SGD's groups: weights of convolutions and the head; then gamma, beta and what is `own`, with a rate of theirs."""
    norms = [p for name, p in net.named_parameters() if "bn" in name]
    others = [p for name, p in net.named_parameters() if "bn" not in name]
    return [{"params": others, "weight_decay": 0.01}, {"params": [*norms, *own], "lr": 0.2}]


def auxiliary(strategy):
    return {f"own {name.removeprefix('net.')}": t for name, t in strategy.state_dict()["auxiliary"].items()}


@pytest.mark.parametrize("method", ["advprop", "fast-advprop", "advbn"])
def test_an_auxiliary_gamma_and_beta_are_trained(method):
    """By the rate of the model's own, and its schedule; a run that goes on in another process is the same."""
    hyper = {"advprop": {**ADVPROP, **SCALE}, "fast-advprop": SCALE, "advbn": {"layer": "conv1", "steps": 2}}[method]
    hyper, parts, plain = hyper | {"aux_affine": True}, batches(8, 8, 8), build("small", dtype=torch.float32)
    strategy = create_strategy(method, plain, **hyper)
    optimizer = torch.optim.SGD(by_groups(plain, strategy.parameters()), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for number, part in enumerate(parts):
        torch.manual_seed(number)
        strategy.accumulate(part, own_loss(plain))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    want = plain.state_dict() | auxiliary(strategy)
    begins = create_strategy(method, build("small", dtype=torch.float32), **hyper)
    assert not torch.equal(want["own bn1.weight"], auxiliary(begins)["own bn1.weight"])

    module = Scheduled()
    apart = Apart(method, **hyper | ({"layer": "net.conv1"} if method == "advbn" else {}))
    trainer = fit(module, parts, apart)
    assert_same(module.net.state_dict() | auxiliary(apart.strategy), want, tolerance=0)
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [4, 8]


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


class Memory(Logger):
    """Keeps what is logged, through Lightning and past it."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.lines, self.direct = [], []

    @property
    def experiment(self):
        return self.direct

    def log_metrics(self, metrics, step=None):
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


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


class Logging(Module):
    """Logs and collects in every way that people do."""

    def __init__(self):
        super().__init__()
        task = {"task": "multiclass", "num_classes": 5}
        self.mean, self.outputs, self.by_class = MeanMetric(), [], {"labels": []}
        self.collection = MetricCollection([Accuracy(**task, average="macro"), Precision(**task, average="macro")])
        self.seen, self.total, self.best, self.calls = 0, torch.zeros(()), None, Calls()
        self.counter, self.confusion, self.nested = Counter(), np.zeros((5, 5), int), [([],)]
        self.means, self.part, self.last = {"loss": MeanMetric()}, nn.Module(), None
        self.part.history = []

    def training_step(self, batch, batch_idx):
        self.calls.count += 1
        logits = self.net(batch["pixel_values"])
        loss = cross_entropy(logits, batch["labels"])
        self.mean(loss.detach())
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log_dict({"loss": loss, "top": logits.max()}, on_step=True, on_epoch=True)
        self.log_dict(self.collection(logits.softmax(1), batch["labels"]), on_step=False, on_epoch=True)
        self.logger.log_metrics({"direct": loss.item()}, self.global_step)
        self.logger.experiment.append(loss.item())
        self.outputs.append(loss.item())
        self.by_class["labels"].extend(batch["labels"].tolist())
        self.seen += len(logits)
        self.total += loss.detach()
        self.best = loss.item() if self.best is None else min(self.best, loss.item())
        self.counter.update(batch["labels"].tolist())
        np.add.at(self.confusion, (batch["labels"].numpy(), logits.argmax(1).numpy()), 1)
        self.nested[0][0].append(loss.item())
        self.means["loss"].update(loss.detach())
        self.part.history.append(loss.item())
        self.last = OrderedDict(loss=loss.detach())
        return {"loss": loss, "logits": logits}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        assert not outputs["logits"].requires_grad
        metrics = (self.mean, *self.collection.values(), self.means["loss"])
        self.figures = [(float(metric.compute()), metric._update_count) for metric in metrics]


class Calls:
    count = 0


def test_what_is_logged_and_collected_counts_once():
    """In the first step the weights are those of a plain run, so that all figures of its batches are, too."""
    parts, runs = batches(8, 8), {}
    for method in ("standard", "apart-sam"):
        module, memory = Logging(), Memory()
        apart = Apart(method, **HYPER[method])
        trainer = fit(module, parts, apart, logger=memory, accumulate_grad_batches=2)
        assert module.calls.count == (2 if method == "standard" else 4)
        attributes = module.outputs, module.by_class, module.seen, float(module.total), module.best
        direct = [line["direct"] for _, line in memory.lines if "direct" in line]
        callback = {key: float(value) for key, value in trainer.callback_metrics.items()}
        runs[method] = attributes, module.figures, direct, memory.direct, callback, memory.lines
        assert trainer.loggers == [memory] and len(module.outputs) == len(direct) == 2
        assert [updates for _, updates in module.figures] == [2, 2, 2, 2]
        assert module.counter.total() == module.confusion.sum() == module.seen == 16
        assert module.nested[0][0] == module.part.history == module.outputs and module.last["loss"] == direct[-1]
        assert "log" not in vars(module) and "log_dict" not in vars(module)
    assert runs["standard"] == runs["apart-sam"]


class Failing(Module):
    fails_in_call = None

    def __init__(self):
        super().__init__()
        self.calls = Calls()

    def on_train_start(self):
        self.calls.before = [*vars(self)]

    def training_step(self, batch, batch_idx):
        self.calls.count += 1
        if self.calls.count == self.fails_in_call:
            raise RuntimeError("of the user")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("fails_in_call", [None, 3, 4])
def test_nothing_is_left_on_the_model(fails_in_call, precision):
    """After a step, and an exception in either pass of the second."""
    module, memory = Failing(), Memory()
    module.fails_in_call = fails_in_call
    trainer = trainer_of(Apart("apart-sam", **HYPER["apart-sam"]), precision=precision, logger=memory)
    before = snapshot(module.net)
    if fails_in_call is None:
        trainer.fit(module, loaders(batches(8, 8)))
    else:
        with pytest.raises(RuntimeError, match="of the user"):
            trainer.fit(module, loaders(batches(8, 8)))
    assert snapshot(module.net) == before and [*vars(module)] == module.calls.before
    assert "training_step" not in vars(trainer.strategy) and trainer.loggers == [memory]


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


class Unseeded(Module):
    def on_train_batch_start(self, batch, batch_idx):
        pass


def saving(path, at):
    """Lightning's own callback, within an epoch or at its end."""
    when = {"every_n_epochs": 1} if at == 6 else {"every_n_train_steps": at}
    return ModelCheckpoint(path, filename="{step}", save_top_k=-1, **when)


@pytest.mark.parametrize("own_generator", [True, False])
@pytest.mark.parametrize("method, kept", [("apart", 3), ("random-bn", 6)])
def test_lightning_s_checkpoints_keep_the_state(method, kept, own_generator, tmp_path):
    """Cut off within an epoch of 6 steps and at its end, within `every`, with ratio below 1."""
    parts, path = batches(*[8] * 6), tmp_path / f"step={kept}.ckpt"

    def apart(seed):
        generator = torch.Generator().manual_seed(seed) if own_generator else None
        return Apart(method, every=2, generator=generator, **hyper_of(method, 0.5))

    whole = Unseeded()
    torch.manual_seed(5)
    more = {"max_epochs": 2, "shuffle": not own_generator and kept == 6, "resumable": kept == 3}
    fit(whole, parts, apart(3), saving(tmp_path, kept), enable_checkpointing=True, **more)
    again, other = Unseeded(), apart(4)
    torch.manual_seed(6)
    fit(again, parts, other, path=path, **more)
    assert other.strategy.steps == 12
    assert_same(again.state_dict(), whole.state_dict(), tolerance=0)


def test_an_auxiliary_gamma_and_beta_go_on_from_a_checkpoint(tmp_path):
    """Their values, and what the optimizer keeps of them, as of the model's; a second fit goes on, too."""
    hyper, parts = {**ADVPROP, **SCALE, "aux_affine": True}, batches(*[8] * 4)
    whole, apart, second, other = Scheduled(), Apart("advprop", **hyper), Scheduled(), Apart("advprop", **hyper)
    fit(whole, parts, apart, saving(tmp_path, 2), enable_checkpointing=True, resumable=True)
    fit(second, parts, other, path=tmp_path / "step=2.ckpt", resumable=True)
    found = [module.net.state_dict() | auxiliary(one.strategy) for module, one in ((second, other), (whole, apart))]
    assert_same(*found, tolerance=0)
    before = [p.detach().clone() for p in other.strategy.parameters()]
    trainer = fit(second, parts, other)
    assert not any(torch.equal(a, b) for a, b in zip(before, other.strategy.parameters()))
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [4, 8]


def test_resuming_with_other_values_is_said_once(tmp_path, caplog):
    """In one line; what the run itself had set goes on without one, and so does a second fit."""
    parts, path = batches(8, 8), tmp_path / "kept.ckpt"
    first = Apart("apart", groups=2, epsilon=0.1)
    trainer = fit(Module(), parts, first)
    first.strategy.set(epsilon=0.05)
    trainer.save_checkpoint(path)
    for epsilon, count in ((0.1, 0), (0.4, 1)):
        caplog.clear()
        other, module = Apart("apart", groups=2, epsilon=epsilon), Module()
        for epochs in (2, 3):
            fit(module, parts, other, path=path if epochs == 2 else None, max_epochs=epochs)
        said = [record.getMessage() for record in caplog.records if "goes on with" in record.getMessage()]
        assert len(said) == count and other.strategy.hyper["epsilon"] == 0.05 and other.strategy.steps > 4
    assert "goes on with epsilon=0.05, as its saved state has it, and not with epsilon=0.4, as given" in said[0]
    with pytest.raises(ApartError, match="the state is of the method 'sam', and goes on with 'sam-on'"):
        trainer = fit(Module(), parts, Apart("sam"))
        trainer.save_checkpoint(path)
        fit(Module(), parts, Apart("sam-on"), path=path, max_epochs=2)


class Returning(Module):
    """Returns what it is told to in a call of training_step; a loss in all others."""

    def __init__(self, output, in_call):
        super().__init__()
        self.output, self.in_call, self.calls = output, in_call, Calls()

    def training_step(self, batch, batch_idx):
        self.calls.count += 1
        loss = super().training_step(batch, batch_idx)
        return self.output if self.calls.count == self.in_call else loss


@pytest.mark.parametrize("in_call", [1, 2])
def test_a_batch_that_the_module_skips(in_call):
    """Skipped with None in either pass, as Lightning skips it: no step is made, and the second batch trains."""
    module, plain = Returning(None, in_call), build("small", dtype=torch.float32)
    first, second = batches(8, 8)
    fit(module, [first, second], Apart("sam"))
    with torch.no_grad():
        plain(first["pixel_values"])
    by_strategy(plain, "sam", [second], own_loss(plain))
    assert_same(module.net.state_dict(), plain.state_dict(), tolerance=0)


@pytest.mark.parametrize("output", ["a loss", {"los": 1}])
def test_what_is_no_loss_is_lightning_s_to_refuse(output):
    with pytest.raises(MisconfigurationException, match=r"must return a Tensor|the 'loss' key"):
        fit(Returning(output, 1), batches(8), Apart("sam"))


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


class Manual(Module):
    """Optimizes by hand, as the documentation shows it."""

    automatic_optimization = False

    def on_fit_start(self):
        self.strategy = create_strategy("apart-sam", self.net, **hyper_of("apart-sam", 0.5))

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss, _ = self.strategy.accumulate(batch, own_loss(self.net), backward=self.manual_backward)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss}


def test_manual_optimization():
    parts, module, plain = batches(8, 8, 8), Manual(), build("small", dtype=torch.float32)
    fit(module, parts)
    losses = by_strategy(plain, "apart-sam", parts, own_loss(plain), **hyper_of("apart-sam", 0.5))
    assert module.said == losses
    assert_same(module.net.state_dict(), plain.state_dict(), tolerance=0)
    with pytest.raises(ApartError, match=r"Manual has automatic_optimization=False, .* docs/LOOPS\.md"):
        fit(Manual(), parts, Apart("apart"))


def test_bad_input():
    for wrong, said in (
        ({"method": "aprat"}, "did you mean 'apart'"),
        ({"method": "sam", "groups": 4}, "method 'sam' has no hyper-parameter 'groups'; it has rho, global_norm"),
    ):
        with pytest.raises(ApartError, match=said):
            Apart(**wrong)
    for wrong, said in (
        ({"epsilon": -1.0}, "epsilon=-1.0: the radius"),
        ({"ratio": 2.0}, "ratio=2.0: N/M"),
        ({"every": 0}, "every=0: the second pass"),
        ({"uneven": "maybe"}, "uneven='maybe': choose"),
    ):
        with pytest.raises(ApartError, match=said):
            fit(Module(), batches(8), Apart("apart", **wrong))
    module = Module()
    module.net.bn2 = type("FrozenBatchNorm", (nn.BatchNorm2d,), {"forward": lambda self, x: x})(8)
    with pytest.raises(ApartError, match=r"BatchNorm layer 'net\.bn2' is a FrozenBatchNorm"):
        fit(module, batches(8), Apart("apart"))
    with pytest.raises(ApartError, match=r"once trainer\.fit has begun"):
        _ = Apart("apart").strategy

    class Iterating(Module):
        def training_step(self, dataloader_iter):
            return super().training_step(*next(dataloader_iter)[:2])

    with pytest.raises(ApartError, match="training_step of Iterating takes dataloader_iter"):
        fit(Iterating(), batches(8), Apart("sam"))
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `Apart`"):
        trainer_of(Apart("sam"), Apart("apart"))


def test_batches_that_do_not_tell_their_samples():
    """Class weights beside the samples: the callback is told how many there are."""

    class Weighted(Module):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self.net(batch["pixel_values"]), batch["labels"], batch["weights"])

    class Counting(Apart):
        def count_samples(self, batch):
            return len(batch["labels"])

    (part,), module, plain = batches(8), Weighted(), build("small", dtype=torch.float32)
    with pytest.raises(ApartError, match=r"5 and 8 rows, .* override count_samples\(batch\) of the callback"):
        fit(Weighted(), [part | {"weights": torch.ones(5)}], Apart("apart", ratio=0.5, groups=2))
    fit(module, [part | {"weights": torch.ones(5)}], Counting("apart", ratio=0.5, groups=2))
    by_strategy(plain, "apart", [part], own_loss(plain), ratio=0.5, groups=2)
    assert_same(module.net.state_dict(), plain.state_dict(), tolerance=1e-6)


@pytest.mark.parametrize("ratio", [1, 0.5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_labels_in_a_list_go_with_their_images(layout, ratio):
    """So does a batch that is a list of samples, as collate functions of detectors leave it."""

    class Named(Module):
        def training_step(self, batch, batch_idx):
            named = isinstance(batch, dict)
            images = batch["pixel_values"] if named else torch.stack([image for image, _ in batch])
            labels = torch.tensor([int(name) for name in batch["names"]] if named else [y for _, y in batch])
            loss = cross_entropy(self.net(images.contiguous(memory_format=layout)), labels)
            self.log("loss", loss, batch_size=8)
            return loss

    parts = batches(8, 8)
    shaped = [part | {"pixel_values": part["pixel_values"].contiguous(memory_format=layout)} for part in parts]
    plain = build("small", dtype=torch.float32).to(memory_format=layout)
    losses = by_strategy(plain, "apart", shaped, own_loss(plain), groups=4, ratio=ratio)
    names = [{"pixel_values": p["pixel_values"], "names": [str(y) for y in p["labels"].tolist()]} for p in shaped]
    lists = [list(zip(part["pixel_values"], part["labels"].tolist())) for part in parts]
    for made in (names, lists):
        module = Named()
        module.net = module.net.to(memory_format=layout)
        fit(module, made, Apart("apart", groups=4, ratio=ratio))
        assert module.said == pytest.approx(losses, rel=1e-6)
        assert_same(module.net.state_dict(), plain.state_dict(), tolerance=1e-5)


def test_without_lightning(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("apart_hf.integrations.lightning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    for kind in (ApartError, ImportError):
        with pytest.raises(kind, match=r"^lightning is not installed; pip install 'apart-hf\[lightning\]'\.$"):
            importlib.import_module("apart_hf.integrations.lightning")
