"""The strategies beside the slow reference: hyper-parameters, a step of each, their comparison."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from apart_hf import create_strategy
from tests.reference import reference_step
from tests.support.helpers import assert_same, gradients

HYPER = {
    "apart": {"epsilon": 0.1, "groups": 4},
    "sam": {"rho": 0.1},
    "apart-sam": {"epsilon": 0.1, "groups": 4, "rho": 0.2},
    "asam": {"rho": 0.5, "eta": 0.02},
    "apart-asam": {"epsilon": 0.1, "groups": 4, "rho": 0.5},
    "sam-on": {"rho": 0.5},
    "random-bn": {"epsilon": 0.1, "groups": 4},
    "ghost-bn": {"groups": 4},
}


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
