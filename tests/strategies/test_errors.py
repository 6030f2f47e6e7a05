"""Bad input to the strategies: a ValueError of one line that says the cure, and a model left as it was."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf import ApartError, create_strategy, list_strategies
from tests.support.helpers import batch, build, snapshot


def test_model_without_batchnorm():
    model = build("vit_tiny_patch16_224", dtype=torch.float32, img_size=32)
    with pytest.raises(ApartError, match=r"no BatchNorm layer.*'sam'"):
        create_strategy("apart", model)
    create_strategy("sam", model).accumulate_gradients(*batch(4, dtype=torch.float32), cross_entropy)


def test_sam_needs_no_supported_batchnorm():
    from timm.layers import convert_splitbn_model

    model = convert_splitbn_model(build("resnet18", dtype=torch.float32), 2)
    with pytest.raises(ApartError, match=r"bn1.*SplitBatchNorm2d"):
        create_strategy("apart", model)
    images, targets = batch(8, dtype=torch.float32)
    plain = copy.deepcopy(model)
    cross_entropy(plain(images), targets).backward()
    create_strategy("sam", model, rho=0.5).accumulate_gradients(images, targets, cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers()))


@pytest.mark.parametrize(
    "method, hyper, message",
    [
        ("apart", {"epsilon": -0.1}, "epsilon=-0.1"),
        ("apart", {"epsilon": float("nan")}, "epsilon=nan"),
        ("apart", {"groups": 0}, "groups=0"),
        ("apart", {"groups": 2.0}, "groups=2.0"),
        ("apart", {"ratio": 0}, "ratio=0"),
        ("apart", {"ratio": 1.5}, "ratio=1.5"),
        ("sam", {"rho": -1}, "rho=-1"),
        ("sam", {"epsilon": 0.1}, "'sam' has no hyper-parameter 'epsilon'; it has rho"),
        ("standard", {"rho": 0.1}, "it has none"),
        ("apart", {"rho": 0.1}, "epsilon, groups, ratio"),
        ("apert", {}, "did you mean 'apart'"),
    ],
)
def test_bad_hyper_parameters(method, hyper, message, model):
    with pytest.raises(ValueError, match=message) as error:
        create_strategy(method, model, **hyper)
    assert isinstance(error.value, ApartError) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "hyper, size, message",
    [
        ({"groups": 3}, 8, "groups=3 does not divide the 8 samples.*1, 2, 4, 8"),
        ({"groups": 1, "ratio": 0.3}, 8, "2.4 samples.*2/8 = 0.25"),
        ({"groups": 4, "ratio": 0.25}, 8, "groups=4 does not divide the 2 samples"),
    ],
)
def test_batches_that_do_not_fit(hyper, size, message, model):
    before = snapshot(model)
    with pytest.raises(ApartError, match=message):
        create_strategy("apart", model, **hyper).accumulate_gradients(*batch(size, dtype=torch.float32), cross_entropy)
    assert snapshot(model) == before and all(p.grad is None for p in model.parameters())


def test_one_value_per_channel_in_a_group_names_the_layer():
    model = build("resnet18", dtype=torch.float32)  # its last stage is 1x1 at 32 pixels
    before = snapshot(model)
    with pytest.raises(ApartError, match=r"'layer4\.0\.bn1'.*one value per channel.*groups=8.*two samples"):
        create_strategy("apart", model, groups=8).accumulate_gradients(*batch(8, dtype=torch.float32), cross_entropy)
    assert snapshot(model) == before


def test_eval_mode_is_refused(model, data):
    with pytest.raises(ApartError, match=r"model\.train\(\)"):
        create_strategy("apart", model.eval(), groups=2).accumulate_gradients(*data, cross_entropy)
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    with pytest.raises(ApartError, match="every BatchNorm layer is in eval mode"):
        create_strategy("apart", model, groups=2).accumulate_gradients(*data, cross_entropy)


def test_a_layer_whose_forward_is_replaced_already_is_refused(model, data):
    layer = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    layer.forward = layer.forward
    with pytest.raises(ApartError, match="already has its forward replaced"):
        create_strategy("apart", model, groups=2).accumulate_gradients(*data, cross_entropy)
    assert "forward" in layer.__dict__


def test_rows_that_belong_to_no_sample_are_refused():
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 5)

        def forward(self, x):
            return self.fc(self.bn(torch.cat([x, x[:1]]))[: len(x)].mean((2, 3)))

    with pytest.raises(ApartError, match="'bn' sees 9 rows for 8 samples"):
        strategy = create_strategy("apart", Stacked(), groups=2)
        strategy.accumulate_gradients(*batch(8, dtype=torch.float32), cross_entropy)
    create_strategy("apart", Stacked(), groups=1).accumulate_gradients(*batch(8, dtype=torch.float32), cross_entropy)


@pytest.mark.parametrize("size", [8, 48, 96, 100])
def test_the_suggested_ratio_is_accepted(size):
    strategy = create_strategy("apart", build("test_byobnet", dtype=torch.float32), groups=1, ratio=0.3001)
    with pytest.raises(ApartError) as error:
        strategy.second_pass_size(size)
    suggested = float(str(error.value).split(" = ")[1].rstrip("."))
    assert create_strategy("apart", strategy.model, groups=1, ratio=suggested).second_pass_size(size) >= 1


def test_strategies_are_listed():
    assert {"standard", "apart", "sam", "apart-sam"} <= set(list_strategies())


LARGE = torch.ones(3, 4)
MISPLACED = [
    ("apart", {"epsilon": LARGE}),
    ("apart", {"groups": LARGE}),
    ("apart", {"ratio": LARGE}),
    ("apart", {"local_attack": LARGE}),
    ("apart", {"generator": LARGE}),
    ("apart", {"accelerator": torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU())}),
    ("apart", {"autocast": np.ones((3, 4))}),
    ("apart", {"every": LARGE}),
    ("sam", {"rho": LARGE}),
    ("awp", {"gamma": LARGE}),
    ("gsam", {"alpha": LARGE}),
    ("asam", {"eta": LARGE}),
    ("advbn", {"layer": LARGE}),
    ("advbn", {"step_size": LARGE}),
    ("advprop", {"pixel_epsilon": LARGE, "mean": 0.5, "std": 0.5}),
    ("advprop", {"steps": LARGE, "mean": 0.5, "std": 0.5}),
    ("advprop", {"mean": LARGE[None], "std": 0.5}),
    ("advprop", {"std": np.ones((3, 4)), "mean": 0.5}),
]


@pytest.mark.parametrize("method, given", MISPLACED, ids=lambda one: one if isinstance(one, str) else next(iter(one)))
def test_values_of_many_lines_are_refused_in_one(method, given):
    with pytest.raises(ApartError, match=next(iter(given))) as caught:
        create_strategy(method, build("test_resnet"), **given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
