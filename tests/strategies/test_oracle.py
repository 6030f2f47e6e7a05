"""The strategies against tests/reference.py in float64: gradients and buffers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf.batchnorm import use_kernels
from tests.reference import reference_step
from tests.support.helpers import assert_same, batch, build, gradients, randomise_batchnorm
from tests.support.oracle import HYPER, check, step

MODELS = ["slim_resnet18", "test_efficientnet", "test_byobnet", "bn1d", "slim_wide_resnet16"]
MAIN = ["standard", "apart", "sam", "apart-sam"]
# below, where the size of a residual network has no part in what is asked: "test_resnet", of the same blocks
# every method, the paper's own on every model
ALL = [(method, name) for method in ["standard", *HYPER] for name in (MODELS if method in MAIN else MODELS[1:4])]


@pytest.mark.parametrize(
    "method, name, channels_last",
    [
        *((*one, channels_last) for one in ALL for channels_last in (False, True)),
        # whole networks, of the same blocks: slow in float64
        ("apart", "wide_resnet40_2", True),
        ("apart-sam", "resnet18", False),
    ],
)
def test_agrees_with_the_oracle(method, name, channels_last):
    # a wide network halves its maps less often than others, and float64 is slow
    model, (images, targets) = build(name), batch(pixels=16 if "wide" in name else 32)
    if channels_last:
        model, images = (t.to(memory_format=torch.channels_last) for t in (model, images))
    deltas = check(model, images, targets, method, HYPER.get(method, {}))
    if "apart" in method or method == "random-bn":  # the comparison means something only if an attack took place
        assert sum(d.abs().sum() for pair in deltas.values() for d in pair) > 0


@pytest.mark.parametrize("method", ["apart", "apart-sam", "random-bn"])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_part_of_a_batch_in_channels_last(name, method):
    model, (images, targets) = build(name), batch()
    model, images = (t.to(memory_format=torch.channels_last) for t in (model, images))
    check(model, images, targets, method, HYPER[method] | {"groups": 2, "ratio": 0.5})


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "name, groups", [("test_resnet", 1), ("test_resnet", 4), ("test_efficientnet", 4), ("bn1d", 4)]
)
@pytest.mark.parametrize("method", ["apart", "apart-sam", "ghost-bn"])
def test_the_kernels_of_devices(method, name, groups, channels_last):
    model, (images, targets) = build(name), batch()
    if channels_last:
        model, images = (t.to(memory_format=torch.channels_last) for t in (model, images))
    with use_kernels("device"):
        check(model, images, targets, method, HYPER[method] | {"groups": groups})


def test_layers_whose_names_look_like_wrappers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.module = nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, 4, 3))
            self.module.bn, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(self.module(self.bn(x)).square().mean((2, 3)))

    torch.manual_seed(0)
    deltas = check(randomise_batchnorm(Net()).double(), *batch(), "apart", HYPER["apart"])
    assert len(deltas) == 2


@pytest.mark.parametrize("groups, ratio", [(1, 1.0), (2, 0.5), (1, 0.25), (8, 1.0), (3, 0.75)])
@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "bn1d"])
def test_groups_and_ratio(name, groups, ratio):
    pixels = 64 if name == "test_resnet" else 32  # more than one value per channel in a group of two
    check(build(name), *batch(pixels=pixels), "apart", {"epsilon": 0.2, "groups": groups, "ratio": ratio})


@pytest.mark.parametrize("method", MAIN[1:])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_adds_to_gradients_that_are_there(name, method):
    model, (images, targets) = build(name), batch()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    earlier = {n: p.grad.clone() for n, p in model.named_parameters()}
    want, _, _ = reference_step(model, images, targets, cross_entropy, method, **HYPER[method])
    step(model, images, targets, method, HYPER[method])
    # what was added is compared, so the sum's rounding counts: 1e-16 of entries of order 1
    assert_same({n: g - earlier[n] for n, g in gradients(model).items()}, want, tolerance=1e-8)
    assert_same(gradients(model), {n: want[n] + earlier[n] for n in want})


@pytest.mark.parametrize("method", HYPER)
@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet"])
def test_frozen_gamma_and_beta(name, method):
    model = build(name)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for i, layer in enumerate(norms):
        layer.weight.requires_grad_(i % 3 != 0)
        layer.bias.requires_grad_(i % 2 != 0)
    deltas = check(model, *batch(), method, HYPER[method])
    if "apart" in method:
        first = next(iter(deltas.values()))  # gamma and beta of the first layer are both frozen: still attacked
        assert first[0].any() and first[1].any()


@pytest.mark.parametrize("method", ["standard", *HYPER])
def test_soft_labels(method):
    model, (images, targets) = build("test_byobnet"), batch()
    lam = 0.3
    onehot = torch.nn.functional.one_hot(targets, 5).double()
    soft = lam * onehot + (1 - lam) * onehot.flip(0)
    mixed = lam * images + (1 - lam) * images.flip(0)
    check(model, mixed, soft, method, HYPER.get(method, {}))


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3])
def test_momentum_of_the_buffers(momentum):
    model = build("test_resnet")
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = momentum
    check(model, *batch(), "apart", HYPER["apart"])


def test_frozen_batchnorm_layers_are_left_alone():
    model = build("test_resnet")
    for name, m in model.named_modules():
        if name.startswith(("bn1", "layer1")) and isinstance(m, torch.nn.BatchNorm2d):
            m.eval()
    check(model, *batch(), "apart", HYPER["apart"])


@pytest.mark.parametrize("method, name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_buffers_are_those_of_a_plain_step_bit_for_bit(method, name, dtype):
    model, (images, targets) = build(name, dtype=dtype), batch(dtype=dtype)
    plain = copy.deepcopy(model)
    cross_entropy(plain(images), targets).backward()
    step(model, images, targets, method, HYPER.get(method, {}))
    for (key, want), (_, got) in zip(plain.named_buffers(), model.named_buffers()):
        assert torch.equal(want, got), key


@pytest.mark.parametrize(
    "method, hyper",
    [("apart", {"epsilon": 0, "groups": 1}), ("sam", {"rho": 0}), ("apart-sam", {"epsilon": 0, "groups": 1, "rho": 0})],
)
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "bn1d"])
def test_without_radius_it_is_the_standard_gradient(name, method, hyper):
    model, (images, targets) = build(name), batch()
    plain = copy.deepcopy(model)
    cross_entropy(plain(images), targets).backward()
    step(model, images, targets, method, hyper)
    assert_same(gradients(model), gradients(plain))
