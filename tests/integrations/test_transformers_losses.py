"""Losses of a transformers Trainer in both passes: its own, those of the user, and what they leave behind."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother

from apart_hf.integrations.transformers import ApartMixin
from tests.support.helpers import assert_same, snapshot
from tests.support.loops import batches, by_strategy, hyper_of
from tests.support.transformers_trainer import (
    Calls,
    Keywords,
    OurTrainer,
    PlainTrainer,
    Seeded,
    WithItems,
    made,
    own_loss,
    rows,
    trained,
)


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
