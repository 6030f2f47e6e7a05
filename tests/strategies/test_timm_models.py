"""Real timm models: Algorithm 1 against the oracle, and no trace of it. The sweep over all: tests/sweep.py."""

import copy
import csv
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import FrozenBatchNormAct2d, StdConv2d
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf import create_strategy
from tests import sweep
from tests.reference import reference_step
from tests.support.helpers import ROOT, assert_same, batch, gradients, randomise_batchnorm, snapshot

# of twelve of timm's files; in the last two, dim 0 of a BN input is not the sample axis
DOZEN = [
    "test_resnet",
    "test_efficientnet",
    "test_byobnet",
    "mobilenetv3_small_050",
    "rexnet_100",
    "regnetx_002",
    "dla46_c",
    "ghostnet_050",
    "repvit_m0_9",
    "hardcorenas_a",
    "lcnet_035",
    "levit_128s",
    "efficientvit_m0",
]
GROUPS = 2


def table() -> list[dict]:
    with (ROOT / "docs" / "models.csv").open() as file:
        return list(csv.DictReader(file))


def build(name):
    """In float64, with no randomness in training, and the smallest input that it takes, in pixels."""
    torch.manual_seed(0)
    pixels, kwargs = next(sweep.inputs(name))
    model = timm.create_model(name, num_classes=sweep.CLASSES, **kwargs).double().train()
    for m in model.modules():
        for rate in ("p", "drop_prob", "drop_path", "attn_drop", "drop_rate"):
            if isinstance(getattr(m, rate, None), float):
                setattr(m, rate, 0.0)
    return randomise_batchnorm(model), pixels


def compare(name):
    """One step against the oracle. Returns (pixels, the largest relative error of a gradient)."""
    model, pixels = build(name)
    images, targets = batch(8, pixels)
    before = snapshot(model)
    hyper = {"epsilon": 0.1, "groups": GROUPS}
    want, buffers, deltas = reference_step(model, images, targets, sweep.criterion, "apart", **hyper)
    create_strategy("apart", model, **hyper).accumulate_gradients(images, targets, sweep.criterion)
    assert snapshot(model) == before
    assert any(d.any() for pair in deltas.values() for d in pair)
    assert_same({n: b.double() for n, b in model.named_buffers()}, {n: b.double() for n, b in buffers.items()})
    return pixels, assert_same(gradients(model), want, tolerance=1e-7)  # tiny inputs of deep networks amplify rounding


@pytest.mark.parametrize("name", DOZEN)
def test_agrees_with_the_oracle(name):
    compare(name)


@pytest.fixture(scope="session")
def report(request):
    """Rows for the file that --report names."""
    rows = []
    yield rows
    if request.config.getoption("--report"):
        with Path(request.config.getoption("--report")).open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file", "model", "parameters", "pixels", "largest_error"])
            writer.writerows(rows)


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted({row["file"] for row in table()}))
def test_the_smallest_model_of_each_file_agrees_with_the_oracle(file, report):
    row = min((row for row in table() if row["file"] == file), key=lambda row: int(row["parameters"]))
    pixels, error = compare(row["model"])
    report.append([file, row["model"], row["parameters"], pixels, f"{error:.1e}"])


def test_the_table_is_complete():
    """A row for every model of the timm that it was made with, all of them fine, the larger ones by their shapes."""
    rows = table()
    assert len(rows) == len({row["model"] for row in rows}) >= 743
    assert all(row["status"] == "ok" for row in rows)
    assert all(row["run"] == "real" for row in rows if int(row["parameters"]) < 100_000_000)


@pytest.mark.parametrize("name", ["test_resnet", "levit_128s"])
def test_the_sweep_sees_what_is_wrong(name, monkeypatch):
    assert sweep.sweep(name, 10**8)["status"] == "ok"
    # a BN layer that moves its buffers once too often
    monkeypatch.setattr("apart_hf.batchnorm.patching._synchronised", lambda layer: layer.running_mean.add_(1) and None)
    assert sweep.sweep(name, 10**8)["status"] != "ok"


@pytest.mark.parametrize("name", ["levit_128s", "efficientvit_m0", "test_resnet"])
def test_a_sample_has_no_part_in_the_statistics_of_other_groups(name):
    """Under one attack, another sample 0 changes what BN layers put out for group 0 and for no other sample."""
    model, pixels = build(name)
    images, targets = batch(8, pixels)
    strategy = create_strategy("apart", model, groups=4)
    (statistics,) = strategy.perturbations
    strategy.accumulate_gradients(images, targets, sweep.criterion)
    attack, outputs = statistics._deltas.clone(), []
    statistics.ascend = lambda generator: statistics._deltas.copy_(attack)
    for layer in statistics.layers.values():
        layer.register_forward_hook(lambda _, args, out: outputs.append(out.detach().view(8, -1)))
    for changed in (images, torch.cat([images[:1].flip(-1) + 1, images[1:]])):
        strategy.accumulate_gradients(changed, targets, sweep.criterion)
    of_pass = len(statistics.layers)
    before, after = outputs[of_pass : 2 * of_pass], outputs[3 * of_pass :]
    for a, b in zip(before, after):
        differs = (a != b).any(1)
        assert differs[[0, 4]].all() and not differs[[1, 2, 3, 5, 6, 7]].any()


@pytest.mark.parametrize("groups", [1, 2])
def test_without_running_statistics(groups):
    model, pixels = build("test_resnet")
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.track_running_stats, m.running_mean, m.running_var, m.num_batches_tracked = False, None, None, None
    images, targets = batch(8, pixels)
    hyper = {"epsilon": 0.1, "groups": groups}
    want, _, _ = reference_step(model, images, targets, cross_entropy, "apart", **hyper)
    create_strategy("apart", model, **hyper).accumulate_gradients(images, targets, cross_entropy)
    assert_same(gradients(model), want, tolerance=1e-9)
    assert not list(model.buffers())


def test_tuple_outputs():
    """A distilled model in training: a loss for each of its two heads."""
    model, pixels = build("levit_128s")
    model.set_distilled_training(True)
    images, targets = batch(8, pixels)

    def criterion(output, targets):
        return cross_entropy(output[0], targets) + 0.5 * cross_entropy(output[1], targets.flip(0))

    hyper = {"epsilon": 0.1, "groups": 1}  # the second term takes a sample's target from elsewhere in the batch
    want, _, _ = reference_step(model, images, targets, criterion, "apart", **hyper)
    _, output = create_strategy("apart", model, **hyper).accumulate_gradients(images, targets, criterion)
    assert_same(gradients(model), want, tolerance=1e-7)
    assert isinstance(output, tuple) and not any(o.requires_grad for o in output) and len(output) == 2


def test_layers_that_are_no_batchnorm_are_untouched():
    """FrozenBatchNorm and StdConv2d's inner batch_norm normalise as ever, in both passes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        StdConv2d(3, 4, 3),
        FrozenBatchNormAct2d(4),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(6 * 36, 5),
    ).double()
    randomise_batchnorm(model)
    frozen = model[1]
    frozen.running_mean.normal_(), frozen.running_var.uniform_(0.5, 2), frozen.weight.normal_()
    images, targets = batch(8, 8)
    buffers, outputs = copy.deepcopy(dict(model.named_buffers())), []
    model[1].register_forward_hook(lambda _, args, out: outputs.append(out.detach()))
    want, _, deltas = reference_step(model, images, targets, cross_entropy, "apart", epsilon=0.1, groups=2)
    outputs.clear()
    create_strategy("apart", model, epsilon=0.1, groups=2).accumulate_gradients(images, targets, cross_entropy)
    assert_same(gradients(model), want)
    assert list(deltas) == ["3"] and torch.equal(*outputs)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers() if n.startswith("1."))
    assert not any(isinstance(model[i], _BatchNorm) for i in (0, 1))
