"""The strategies beside the slow reference: hyper-parameters, a step of each, their comparison."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from apart_hf import create_strategy
from apart_hf.strategies.auxiliary_batchnorm import auxiliary_of
from tests.reference import reference_images_step, reference_step
from tests.support.helpers import assert_same, gradients

HYPER = {
    "apart": {"epsilon": 0.1, "groups": 4},
    "sam": {"rho": 0.1},
    "apart-sam": {"epsilon": 0.1, "groups": 4, "rho": 0.2},
    "asam": {"rho": 0.5, "eta": 0.02},
    "apart-asam": {"epsilon": 0.1, "groups": 4, "rho": 0.5},
    "sam-on": {"rho": 0.5},
    "gsam": {"rho": 0.1, "alpha": 0.7},
    "awp": {"gamma": 0.05},
    "random-bn": {"epsilon": 0.1, "groups": 4},
    "ghost-bn": {"groups": 4},
}

# the methods that move pixels, which `reference_images_step` knows; every model of the tests is told the scale
PIXELS = {
    "advprop": {"pixel_epsilon": 4.0, "steps": 3},
    "fast-advprop": {"ratio": 0.25},
    "apart-advprop": {"epsilon": 0.1, "groups": 4, "steps": 2},
}
SCALE = {"mean": [0.5, 0.4, 0.6], "std": [0.3, 0.25, 0.2]}

# in a model "small", with auxiliary gamma and beta where a method has any
FAMILY = {
    **HYPER,
    **{method: {**hyper, **SCALE} for method, hyper in PIXELS.items()},
    "advbn": {"layer": "conv1", "steps": 3, "aux_affine": True},
}
for _method in ("advprop", "fast-advprop"):
    FAMILY[_method] = {**FAMILY[_method], "aux_affine": True}


def step(model, images, targets, method, hyper, criterion=cross_entropy, generator=None):
    strategy = create_strategy(method, model, generator=generator, **hyper)
    return strategy.accumulate_gradients(images, targets, criterion)


def check(model, images, targets, method, hyper, criterion=cross_entropy, tolerance=1e-10):
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    want, buffers, deltas = reference_step(model, images, targets, criterion, method, generator=generators[0], **hyper)
    step(model, images, targets, method, hyper, criterion, generators[1])
    assert_same(gradients(model), want, tolerance)
    assert_same({n: b.double() for n, b in model.named_buffers()}, {n: b.double() for n, b in buffers.items()})
    return deltas


def check_images(model, images, targets, method, hyper, criterion=cross_entropy, tolerance=1e-10):
    """Compare a step of a method that moves pixels with the oracle: gradients, buffers, and what the strategy holds."""
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    want, buffers, own, held = reference_images_step(
        model, images, targets, criterion, method, generator=generators[0], **SCALE, **hyper
    )
    strategy = create_strategy(method, model, generator=generators[1], **SCALE, **hyper)
    strategy.accumulate_gradients(images, targets, criterion)
    assert_same(gradients(model), want, tolerance)
    if buffers:
        assert_same({n: b.double() for n, b in model.named_buffers()}, {n: b.double() for n, b in buffers.items()})
    assert torch.equal(*(generator.get_state() for generator in generators))
    compare_held(strategy, own, held, tolerance)
    return strategy


def compare_held(strategy, own, held, tolerance=1e-10):
    """Compare auxiliary BN with the oracle's: gradients of gamma and beta, and all tensors."""
    found = {name: p for a in auxiliary_of(strategy.perturbations) for name, p in a.named_parameters()}
    assert {name for name, p in found.items() if p.requires_grad} == set(own)
    if own:
        assert_same({name: found[name].grad for name in own}, own, tolerance)
    if held and "auxiliary" in strategy.state_dict():
        state = strategy.state_dict()["auxiliary"]
        assert_same({n: t.double() for n, t in state.items()}, {n: t.double() for n, t in held.items()})
