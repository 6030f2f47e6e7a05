"""An ascent of several steps: how often a perturbation climbs, on which samples, and what it leaves as it was."""

import copy
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf import METHODS, ApartError, Method, Perturbation, create_loss, create_strategy
from tests.support.helpers import assert_same, batch, build, gradients, snapshot


class Shift(Perturbation):
    """Moves what the classifier gives by one vector, uphill in steps of `size` without a bound."""

    defaults: ClassVar = {"size": 0.5, "steps": 3}
    counts_samples = False

    def __init__(self, model, *, size, steps):
        super().__init__(model)
        self.size, self.steps = size, steps
        self.shift, self.log = torch.zeros(5, dtype=torch.float64), []

    @contextmanager
    def _open(self, kind, samples, leaf):
        self.log.append((kind, samples))
        classifier = next(m for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features == 5)
        handle = classifier.register_forward_hook(lambda _, args, out: out + leaf)
        try:
            yield
        finally:
            handle.remove()

    def observed(self, samples):
        self.shift = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        return self._open("clean", samples, self.shift)

    def climbing(self, samples):
        self.shift = self.shift.detach().requires_grad_()
        return self._open("climbing", samples, self.shift)

    def applied(self, samples):
        return self._open("applied", samples, self.shift.detach())

    def select(self, chosen):
        self.log.append(("select", None if chosen is None else chosen.tolist()))

    def ascend(self, generator=None):
        self.log.append(("ascend", None))
        self.shift = self.shift.detach() + self.size * self.shift.grad / self.shift.grad.norm()


class SteppedWeights(Perturbation):
    """Climbs in the weights by their own gradient, in steps of `size`."""

    defaults: ClassVar = {"size": 0.1, "steps": 2}
    reads_weight_gradients = True
    counts_samples = False

    def __init__(self, model, *, size, steps):
        super().__init__(model)
        self.size, self.steps = size, steps

    def observed(self, samples):
        self.moves = [torch.zeros_like(p) for p in self.model.parameters()]
        return super().observed(samples)

    def ascend(self, generator=None):
        self.moves = [move + self.size * p.grad for move, p in zip(self.moves, self.model.parameters())]

    @contextmanager
    def applied(self, samples):
        before = [p.detach().clone() for p in self.model.parameters()]
        try:
            for p, move in zip(self.model.parameters(), self.moves):
                p.data.add_(move)
            yield
        finally:
            for p, value in zip(self.model.parameters(), before):
                p.data.copy_(value)


TABLE = {
    "shift": Method("an offset of the logits", (Shift,)),
    "apart-shift": Method("with BN statistics", (*METHODS["apart"].perturbations, Shift)),
    "sam-shift": Method("with weights", (*METHODS["sam"].perturbations, Shift), keeps_clean_gradient=False),
    "stepped": Method("weights in steps", (SteppedWeights,), keeps_clean_gradient=False),
}


@pytest.fixture(autouse=True)
def _methods(monkeypatch):
    for name, method in TABLE.items():
        monkeypatch.setitem(METHODS, name, method)


@pytest.fixture
def small():
    return build("small"), batch(8, 12)


def naive_shift(model, images, targets, steps, size):
    """Steps of an offset of the logits, each with a forward of its own; then both gradients, half and half."""
    network = copy.deepcopy(model)
    parameters = list(network.parameters())
    clean = torch.autograd.grad(cross_entropy(network(images), targets), parameters)
    shift = torch.zeros(5, dtype=torch.float64)
    for _ in range(steps):
        leaf = shift.clone().requires_grad_()
        (g,) = torch.autograd.grad(cross_entropy(network(images) + leaf, targets), leaf)
        shift = shift + size * g / g.norm()
    perturbed = torch.autograd.grad(cross_entropy(network(images) + shift, targets), parameters)
    return {name: (a + b) / 2 for (name, _), a, b in zip(network.named_parameters(), clean, perturbed)}


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("as_loss", [False, True])
def test_each_step_climbs_from_where_the_one_before_has_led(steps, as_loss, small):
    model, data = small
    plain, before = copy.deepcopy(model), snapshot(model)
    cross_entropy(plain(data[0]), data[1]).backward()
    want = naive_shift(model, *data, steps, 0.5)
    if as_loss:
        loss = create_loss("shift", model, lambda model, batch: cross_entropy(model(batch[0]), batch[1]), steps=steps)
        loss(data).backward()
    else:
        create_strategy("shift", model, steps=steps).accumulate_gradients(*data, cross_entropy)
    assert_same(gradients(model), want)
    assert snapshot(model) == before and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers()))


def test_the_samples_of_all_passes_after_the_clean_one_are_the_same(small):
    model, data = small
    strategy = create_strategy("shift", model, ratio=0.5, generator=torch.Generator().manual_seed(3))
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    strategy.accumulate_gradients(*data, cross_entropy)
    chosen = torch.randperm(8, generator=torch.Generator().manual_seed(3))[:4]
    climb = [("climbing", 4), ("ascend", None)]
    assert strategy.perturbations[0].log == [
        *[("clean", 8), ("ascend", None), ("select", chosen.tolist()), *climb, *climb],
        ("applied", 4),
    ]
    assert torch.equal(seen[0], data[0]) and len(seen) == 4
    assert all(torch.equal(one, data[0][chosen]) for one in seen[1:])


def test_passes_are_counted(small):
    model, _ = small
    passes = {
        hyper: create_strategy("shift", model, **dict(hyper)).passes
        for hyper in [(), (("steps", 1),), (("steps", 5), ("ratio", 0.5)), (("steps", 5), ("every", 2))]
    }
    assert list(passes.values()) == [4.0, 2.0, 3.5, 3.5]
    strategy = create_strategy("apart-shift", model, groups=2)
    strategy.set(steps=2)
    assert strategy.passes == 3.0 == METHODS["apart-shift"].passes(steps=2)


@pytest.mark.parametrize("method", ["apart-shift", "sam-shift"])
def test_others_stand_where_they_are_in_each_pass(method, small):
    """Three passes climb beside a perturbation that is used up by being applied: it is in place in all of them."""
    model, data = small
    strategy, seen = create_strategy(method, model, **({"groups": 2} if "apart" in method else {})), []
    bn, other = model.bn1, strategy.perturbations[0]
    bn.register_forward_hook(
        lambda layer, args, out: seen.append((out.detach().clone(), layer.weight.detach().clone()))
    )
    weight = bn.weight.detach().clone()
    strategy.accumulate_gradients(*data, cross_entropy)
    outputs, weights = zip(*seen)
    assert len(seen) == 4
    assert not torch.equal(outputs[0], outputs[1])
    assert all(torch.equal(out, outputs[1]) for out in outputs[2:])
    if method == "sam-shift":
        assert not torch.equal(weights[1], weight) and all(torch.equal(w, weights[1]) for w in weights[2:])
        assert not other._steps
    assert torch.equal(bn.weight, weight)


@pytest.mark.parametrize("as_loss", [False, True])
def test_weights_climb_by_the_gradient_of_each_pass_alone(as_loss, small):
    model, (images, targets) = small
    network = copy.deepcopy(model)
    moved = list(network.parameters())
    for _ in range(2):
        g = torch.autograd.grad(cross_entropy(network(images), targets), moved)
        for p, part in zip(moved, g):
            p.data.add_(0.1 * part)
    want = torch.autograd.grad(cross_entropy(network(images), targets), moved)
    weights = copy.deepcopy(list(model.parameters()))
    earlier = [torch.randn_like(p) for p in weights]
    for p, g in zip(model.parameters(), earlier):
        p.grad = g.clone()
    views = [p.grad for p in model.parameters()]
    if as_loss:
        loss = create_loss("stepped", model, lambda model, batch: cross_entropy(model(batch[0]), batch[1]))
        loss((images, targets)).backward()
    else:
        create_strategy("stepped", model).accumulate_gradients(images, targets, cross_entropy)
    for p, g, part, weight, view in zip(model.parameters(), earlier, want, weights, views):
        torch.testing.assert_close(p.grad, g + part, rtol=1e-10, atol=1e-10)
        assert torch.equal(p, weight) and p.grad is view


@pytest.mark.parametrize("fails_in_pass", [1, 2, 3, 4])
@pytest.mark.parametrize("method", ["apart-shift", "sam-shift", "stepped"])
def test_nothing_is_left_after_an_exception(method, fails_in_pass, small):
    model, data = small
    before, weights, calls = snapshot(model), copy.deepcopy(list(model.parameters())), []
    for p in model.parameters():
        p.grad = torch.ones_like(p)

    def criterion(output, targets):
        calls.append(1)
        if len(calls) == min(fails_in_pass, 3 if method == "stepped" else 4):
            raise RuntimeError("user's criterion")
        return cross_entropy(output, targets)

    strategy = create_strategy(method, model, **({"groups": 2} if "apart" in method else {}))
    with pytest.raises(RuntimeError, match="user's criterion"):
        strategy.accumulate_gradients(*data, criterion)
    assert snapshot(model) == before and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights))
    if "apart" not in method:
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_frozen_weights_stay_frozen_and_a_criterion_learns_from_two_passes_alone(small):
    model, data = small
    model.conv1.weight.requires_grad_(False)
    criterion = nn.Module()
    criterion.scale = nn.Parameter(torch.ones(5, dtype=torch.float64))
    criterion.forward = lambda output, targets: cross_entropy(output * criterion.scale, targets)
    grads = []
    for steps in (1, 4):
        criterion.scale.grad = None
        # a step of size 0 leads nowhere
        create_strategy("shift", model, steps=steps, size=0.0).accumulate_gradients(*data, criterion)
        grads.append(criterion.scale.grad)
    assert not model.conv1.weight.requires_grad and model.conv1.weight.grad is None
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)


def test_too_few_values_are_found_in_a_further_pass(small):
    model, data = small
    model.bn3, model.fc = nn.BatchNorm1d(8).double(), nn.Sequential(nn.BatchNorm1d(8).double(), model.fc)
    with pytest.raises(ApartError, match="one value per channel"):
        create_strategy("apart-shift", model, groups=8).accumulate_gradients(*data, cross_entropy)
    strategy = create_strategy("apart-shift", model, groups=8, uneven="fit")
    strategy.accumulate_gradients(*data, cross_entropy)
    assert [kind for kind, _ in strategy.perturbations[1].log].count("climbing") == 3  # the first one failed
