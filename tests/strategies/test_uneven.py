"""Batches that groups or ratio do not fit: refused, taken plainly, or by the nearest second pass that fits."""

import copy
import logging
import re

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf import METHODS, ApartError, Method, create_loss, create_strategy
from apart_hf.batchnorm.patching import TooFewValues
from apart_hf.strategies.perturbation import Perturbation
from tests.support.helpers import assert_same, batch, build, gradients, snapshot

# (hyper-parameters, samples) -> those under which the oracle's own strategy takes them; None: no second pass is left
FITS = [
    ({"groups": 4}, 61, {"groups": 1}),  # a prime
    ({"groups": 4}, 62, {"groups": 2}),
    ({"groups": 16}, 60, {"groups": 15}),
    ({"groups": 16}, 8, {"groups": 8}),  # fewer than groups
    ({"groups": 2}, 1, {"groups": 1}),
    ({"groups": 4, "ratio": 0.5}, 8, {"groups": 4, "ratio": 0.5}),  # it fits as it is
    ({"groups": 1, "ratio": 0.5}, 7, {"groups": 1, "ratio": 3 / 7}),
    ({"groups": 4, "ratio": 0.5}, 13, {"groups": 3, "ratio": 6 / 13}),
    ({"groups": 1, "ratio": 0.25}, 3, None),
    ({"groups": 1, "ratio": 0.5}, 1, None),
]


def taken(method, samples, way="accumulate", **hyper):
    """Gradients of a batch, and buffers."""
    model, (x, y) = build("small"), batch(samples, 8)
    hyper["generator"] = torch.Generator().manual_seed(3)
    if way == "plain":
        cross_entropy(model(x), y).backward()
    elif way == "accumulate":
        create_strategy(method, model, **hyper).accumulate_gradients(x, y, cross_entropy)
    else:
        loss_fn = lambda model, part: cross_entropy(model(part[0]), part[1])  # noqa: E731
        create_loss(method, model, loss_fn, **hyper)((x, y)).backward()
    return gradients(model) | dict(model.named_buffers())


@pytest.mark.parametrize("way", ["accumulate", "create_loss"])
@pytest.mark.parametrize("hyper, samples, fitted", FITS, ids=lambda value: str(value))
def test_fit_is_the_nearest_that_fits(hyper, samples, fitted, way):
    for method in ("apart-sam", "random-bn"):
        want = taken(method, samples, "plain") if fitted is None else taken(method, samples, way, **fitted)
        assert_same(taken(method, samples, way, uneven="fit", **hyper), want, tolerance=0)


@pytest.mark.parametrize("way", ["accumulate", "create_loss"])
@pytest.mark.parametrize("hyper, samples", [(h, n) for h, n, fitted in FITS if fitted != h])
def test_plain_is_an_ordinary_pass_and_error_refuses(hyper, samples, way):
    for method in ("apart", "ghost-bn"):
        own = {key: value for key, value in hyper.items() if key in METHODS[method].hyper_parameters()}
        assert_same(taken(method, samples, way, uneven="plain", **own), taken(method, samples, "plain"), tolerance=0)
        for options in ({}, {"uneven": "error"}):
            with pytest.raises(ApartError, match=r"does not divide|not a whole number"):
                taken(method, samples, way, **own, **options)


@pytest.mark.parametrize("uneven", ["error", "plain", "fit"])
@pytest.mark.parametrize("method", ["standard", "sam", "apart"])
def test_a_batch_that_fits_is_what_it_is(method, uneven):
    hyper = {"groups": 4} if method == "apart" else {}
    assert_same(taken(method, 8, uneven=uneven, **hyper), taken(method, 8, **hyper), tolerance=0)


class OneValue(nn.Module):
    """Its second layer sees one value per channel and sample, as the last stage of a network does on small images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.fc1 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Linear(6, 6)
        self.late, self.fc2 = nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.bn(self.conv(x)).square().mean((2, 3))
        return self.fc2(self.late(self.fc1(x)).tanh())


@pytest.mark.parametrize("method", ["apart", "apart-sam", "random-bn", "ghost-bn"])
@pytest.mark.parametrize("samples, groups, nearest", [(8, 16, 4), (8, 8, 4), (7, 16, 1), (6, 4, 3)])
def test_groups_of_one_sample_where_a_layer_has_one_value_of_each(samples, groups, nearest, method, caplog):
    """fit leaves two samples in each; plain adds an ordinary pass; error says which layer. SAM's step is not lost."""
    found, (x, y) = {}, batch(samples, 8)
    for uneven in ("error", "plain", "fit", "nearest"):
        model = OneValue().double().train()
        own = nearest if uneven == "nearest" else min(groups, samples)
        before = snapshot(model)
        kind = "error" if uneven == "nearest" else uneven
        strategy = create_strategy(method, model, groups=own, uneven=kind, generator=torch.Generator().manual_seed(1))
        if uneven == "error" and samples == own:
            with pytest.raises(TooFewValues, match=r"'late' has one value per channel.*two samples"):
                strategy.accumulate_gradients(x, y, cross_entropy)
        elif samples % own == 0 or uneven != "error":
            strategy.accumulate_gradients(x, y, cross_entropy)
        assert snapshot(model) == before
        found[uneven] = gradients(model) | dict(model.named_buffers())
        if samples == own and kind in ("plain", "fit") and uneven != "nearest":
            assert len(caplog.records) == 1
        caplog.clear()
    assert_same(found["fit"], found["nearest"], tolerance=0)
    model = OneValue().double().train()
    cross_entropy(model(x), y).backward()
    # not to the last bit, which differs by machine: the pass is added in two halves
    assert_same(found["plain"], gradients(model) | dict(model.named_buffers()), tolerance=1e-14)


def test_a_single_sample_that_batchnorm_itself_refuses():
    """One value per channel in the ordinary pass, too: torch's own error, or ours with the layer's name."""
    for uneven in ("plain", "fit"):
        strategy = create_strategy("apart", OneValue().double().train(), groups=4, uneven=uneven)
        with pytest.raises(ValueError, match=r"more than 1 value per channel|'late' has one value per channel"):
            strategy.accumulate_gradients(*batch(1, 8), cross_entropy)


@pytest.mark.parametrize(
    "uneven, said",
    [
        ("plain", r"^a batch of 7 samples takes an ordinary pass: ratio=0.5 of a batch of 7 is 3.5 samples"),
        ("fit", r"^a batch of 7 samples takes groups=3 and 3 samples in the second pass, the nearest that fits it"),
    ],
)
def test_what_was_done_is_logged_once(uneven, said, caplog):
    strategy = create_strategy("apart", build("small"), uneven=uneven, groups=4, ratio=0.5)
    with caplog.at_level(logging.WARNING, "apart_hf"):
        strategy.accumulate_gradients(*batch(16, 8), cross_entropy)
        assert not caplog.records
        for size in (7, 9, 7):
            strategy.accumulate_gradients(*batch(size, 8), cross_entropy)
    (record,) = caplog.records
    assert re.search(said, record.getMessage()) and "\n" not in record.getMessage()


def test_hyper_parameters_are_what_they_were_afterwards():
    strategy = create_strategy("apart", build("small"), groups=4, uneven="fit")
    (statistics,) = strategy.perturbations
    strategy.accumulate_gradients(*batch(6, 8), cross_entropy)
    assert statistics.groups == strategy.hyper["groups"] == 4

    def fail(*_):
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        strategy.accumulate_gradients(*batch(6, 8), fail)
    assert statistics.groups == 4


def test_a_perturbation_of_one_s_own_says_what_fits():
    class Pairs(Perturbation):
        def check(self, samples):
            if samples % 2:
                raise ApartError(f"{samples} samples are not pairs; take an even batch.")

    METHODS["pairs"] = Method("pairs alone", (Pairs,))
    try:
        model, (x, y) = build("small"), batch(7, 8)
        plain = copy.deepcopy(model)
        with pytest.raises(ApartError, match="7 samples are not pairs"):
            create_strategy("pairs", model).accumulate_gradients(x, y, cross_entropy)
        for uneven in ("plain", "fit"):
            model.zero_grad()
            create_strategy("pairs", model, uneven=uneven).accumulate_gradients(x, y, cross_entropy)
            plain.zero_grad()
            cross_entropy(plain(x), y).backward()
            assert_same(gradients(model), gradients(plain), tolerance=0)
    finally:
        del METHODS["pairs"]


@pytest.mark.parametrize("uneven", ["no", None, "Fit", True])
def test_uneven_is_one_of_three(uneven, model):
    for make in (create_strategy, lambda *a, **k: create_loss(*a, lambda m, b: m(b).mean(), **k)):
        with pytest.raises(ApartError, match="choose 'error', 'plain' or 'fit'"):
            make("apart", model, uneven=uneven)
