"""What the callback for Lightning refuses, and what the user can do in its place."""

import importlib
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf import ApartError, create_strategy
from apart_hf.integrations.lightning import Apart
from tests.support.helpers import assert_same, build
from tests.support.lightning_trainer import Module, fit, own_loss, trainer_of
from tests.support.loops import batches, by_strategy, hyper_of

pytestmark = pytest.mark.usefixtures("quiet_lightning")


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
