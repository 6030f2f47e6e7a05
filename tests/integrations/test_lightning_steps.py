"""What a module of Lightning returns, logs and keeps in the two calls of its training_step."""

from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics import Accuracy, MeanMetric, MetricCollection, Precision

from apart_hf.integrations.lightning import Apart
from tests.support.helpers import assert_same, build, snapshot
from tests.support.lightning_trainer import Calls, Memory, Module, fit, loaders, own_loss, trainer_of
from tests.support.loops import HYPER, batches, by_strategy

pytestmark = pytest.mark.usefixtures("quiet_lightning")


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
