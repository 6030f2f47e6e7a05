"""Models without BatchNorm: methods that move its statistics are refused in one line, all others train."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf import ApartError, create_loss, create_strategy
from tests.reference import reference_advbn_step
from tests.support.helpers import assert_same, batch, gradients
from tests.support.oracle import PIXELS, SCALE, check_images


def without():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)).double()


@pytest.mark.parametrize("name", ["advprop", "fast-advprop"])
def test_images_are_attacked(name):
    strategy = check_images(without(), *batch(8, 4), name, PIXELS[name])
    assert strategy.state_dict()["auxiliary"] == {}
    assert not list(strategy.parameters()) and not list(strategy.buffers())


def test_a_list_and_a_loss_attack_them_likewise():
    data, found = batch(8, 4), []
    for way in ("name", "list", "loss"):
        model = without()
        if way == "loss":
            create_loss("advprop", model, lambda m, b: cross_entropy(m(b[0]), b[1]), **SCALE)(data).backward()
        else:
            method = "advprop" if way == "name" else ["advprop"]
            create_strategy(method, model, **SCALE).accumulate_gradients(*data, cross_entropy)
        found.append(gradients(model))
    assert_same(found[1], found[0], tolerance=0)
    assert_same(found[2], found[0], tolerance=1e-14)


def test_features_of_a_layer_are_attacked():
    model, data = without(), batch(8, 4)
    want, _, _ = reference_advbn_step(model, *data, cross_entropy, "0", steps=2)
    create_strategy("advbn", model, layer="0", steps=2).accumulate_gradients(*data, cross_entropy)
    assert_same(gradients(model), want)


@pytest.mark.parametrize("create", [create_strategy, lambda *a, **o: create_loss(*a, lambda m, b: m(b).mean(), **o)])
@pytest.mark.parametrize(
    "method",
    ["apart-advprop", "apart", "apart-sam", "random-bn", "ghost-bn", ["apart", "advprop"], ["advprop", "apart"]],
    ids=str,
)
def test_statistics_are_not(method, create):
    with pytest.raises(ApartError, match=r"Sequential has no BatchNorm layer.*'sam'") as caught:
        create(method, without(), **(SCALE if "advprop" in str(method) else {}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method, hyper", [("advprop", SCALE), ("fast-advprop", SCALE), ("advbn", {"layer": "0"})])
def test_an_auxiliary_gamma_needs_one(method, hyper):
    with pytest.raises(ApartError, match=r"aux_affine=True: Sequential has no BatchNorm layer") as caught:
        create_strategy(method, without(), aux_affine=True, **hyper)
    assert "\n" not in str(caught.value)
