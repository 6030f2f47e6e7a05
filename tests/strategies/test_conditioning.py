"""The oracle on networks whose last maps are one pixel large: what differs there is rounding that the network enlarges.

At 32 pixels, BN normalises as few values of a channel there as a pass, or a group, has samples. Of two values, both
become +1 or -1 whatever they were, so that the gradient behind them is what rounding leaves of a difference; each
such layer divides it by its deviation again. Signs are not what differs: no gradient of an image, and none of a
statistic outside of the dead zone, is within rounding of zero.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy

from apart_hf import create_strategy
from tests.reference import reference_advbn_step, reference_images_step, reference_step
from tests.support.helpers import assert_same, batch, build, difference, gradients
from tests.support.oracle import PIXELS, SCALE

NAMES = ["regnetx_002", "mobilenetv3_small_050"]
HYPER = {
    "apart": {"epsilon": 0.1, "groups": 2},
    "sam": {"rho": 0.1},
    "gsam": {"rho": 0.1, "alpha": 0.7},
    "awp": {"gamma": 0.05},
    "advprop": {**SCALE, "steps": 3},
    "fast-advprop": {**SCALE, "ratio": 0.5},
    "advbn": {"steps": 3},
}


def oracle(model, images, targets, method, hyper):
    generator = torch.Generator().manual_seed(7)
    if method in PIXELS:
        return reference_images_step(model, images, targets, cross_entropy, method, generator=generator, **hyper)
    if method == "advbn":
        layer = create_strategy(method, model).perturbations[0].name
        return reference_advbn_step(model, images, targets, cross_entropy, layer, **hyper)
    return reference_step(model, images, targets, cross_entropy, method, generator=generator, **hyper)


def ours(model, images, targets, method, hyper):
    strategy = create_strategy(method, model, generator=torch.Generator().manual_seed(7), **hyper)
    strategy.accumulate_gradients(images, targets, cross_entropy)
    return gradients(model)


def in_the_last_bit(images):
    """The images, of which each value has moved by its last bit, up or down, or not at all."""
    bits = torch.randint(-1, 2, images.shape, generator=torch.Generator().manual_seed(3)).double()
    moved = images * (1 + torch.finfo(images.dtype).eps * bits)
    assert 0.5 < (moved != images).double().mean() < 0.8
    return moved


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", HYPER)
def test_agrees_with_the_oracle(method, name):
    model, (images, targets) = build(name), batch(32)
    want = oracle(model, images, targets, method, HYPER[method])[0]
    assert_same(ours(model, images, targets, method, HYPER[method]), want)


@pytest.mark.parametrize(
    "method, samples, hyper", [("apart", 8, {"groups": 4}), ("awp", 4, {}), ("fast-advprop", 8, {})]
)
@pytest.mark.parametrize("name", NAMES)
def test_what_differs_is_what_the_last_bit_of_the_images_changes(name, method, samples, hyper):
    """Of few values of a channel, 1e-10 cannot be asked for: the oracle differs as much from itself."""
    model, (images, targets), hyper = build(name), batch(samples), HYPER[method] | hyper
    want = oracle(model, images, targets, method, hyper)[0]
    own = difference(oracle(model, in_the_last_bit(images), targets, method, hyper)[0], want)
    found = difference(ours(model, images, targets, method, hyper), want)
    assert found <= 30 * own
    if (name, method) == ("regnetx_002", "apart"):
        assert own > 0.1  # two values of a channel, in every layer of a stage


@pytest.mark.parametrize("samples", [2, 8, 32])
@pytest.mark.parametrize("name", NAMES)
def test_signs_are_decided(name, samples):
    """All deltas of pixels and statistics are the oracle's, in the worst case as well; gradients are far from zero."""
    model, (images, targets) = build(name), batch(samples)
    x = images.clone().requires_grad_()
    (g,) = torch.autograd.grad(cross_entropy(model(x), targets), x)
    assert (g.abs() > 1e-11 * g.abs().max()).all()
    want, seen = oracle(build(name), images, targets, "apart", {"epsilon": 0.1, "groups": 1})[2], []
    strategy = create_strategy("apart", build(name), groups=1)
    (statistics,) = strategy.perturbations
    ascend = statistics.ascend

    def noted(generator):
        ascend(generator)
        seen.append({layer: (mu.clone(), sigma.clone()) for layer, (mu, sigma) in statistics._fixed.items()})

    statistics.ascend = noted
    strategy.accumulate(
        (images, targets), lambda part: cross_entropy(strategy.model(part[0]), part[1]), samples=samples
    )
    assert seen[0].keys() == want.keys()
    for layer, pair in want.items():
        assert all(torch.equal(a, b) for a, b in zip(seen[0][layer], pair))


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_those_of_the_oracle(name):
    """What each network sees in each pass, up to rounding: a sign that differed would be 1/255 of the range."""
    model, (images, targets), seen = build(name), batch(4), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    oracle(model, images, targets, "advprop", HYPER["advprop"])
    half = len(seen)
    ours(model, images, targets, "advprop", HYPER["advprop"])
    assert half == 4 and len(seen) == 8
    for one, two in zip(seen[:half], seen[half:]):
        assert (one - two).abs().max() < 1e-12
    assert (seen[-1] - images).abs().max() > 0.01
