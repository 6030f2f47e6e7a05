"""How two gradients become one: what the surrogate gap adds, what stays visible, and gradients of odd parameters."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf import METHODS, ApartError, Method, create_loss, create_strategy
from apart_hf.strategies.combination import Balanced, MeanBySamples, PerturbedAlone, SurrogateGap
from apart_hf.strategies.perturbation import Perturbation
from tests.support.helpers import assert_same, batch, build, gradients
from tests.support.oracle import step


def taken(method, **hyper):
    model = build("test_byobnet")
    step(model, *batch(), method, hyper)
    return torch.cat([g.flatten() for g in gradients(model).values()])


def test_the_surrogate_gap_adds_what_is_orthogonal():
    clean, perturbed = taken("standard"), taken("sam", rho=0.3)
    added = taken("gsam", rho=0.3, alpha=0.5) - perturbed
    assert abs(added @ perturbed) < 1e-12 * added.norm() * perturbed.norm()
    # against the clean gradient: the gap f_p - f falls, since the step goes down along the sum
    assert added @ clean < 0 and added.norm() > 0.05 * clean.norm()
    cosine = clean @ perturbed / clean.norm() / perturbed.norm()
    assert float(added.norm()) == pytest.approx(float(0.5 * clean.norm() * (1 - cosine**2).sqrt()), rel=1e-10)
    assert torch.equal(taken("gsam", rho=0.3, alpha=0.0), perturbed)


def test_a_method_names_its_combination():
    kinds = {name: method.combined_by for name, method in METHODS.items() if method.perturbations}
    assert {name for name, kind in kinds.items() if kind is SurrogateGap} == {"gsam"}
    assert {name for name, kind in kinds.items() if kind is PerturbedAlone} == {"sam", "asam", "sam-on", "awp"}
    assert {name for name, kind in kinds.items() if kind is Balanced} == {"fast-advprop"}
    assert all(kind in (MeanBySamples, PerturbedAlone, SurrogateGap, Balanced) for kind in kinds.values())
    alone = (PerturbedAlone, SurrogateGap)
    assert all(kind.keeps_clean_gradient == (kind not in alone) for name, kind in kinds.items())
    assert Method("own", combination=SurrogateGap).hyper_parameters() == {"alpha": 0.01}


class Odd(nn.Module):
    """A parameter for each pass alone, and one that neither uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.calls = nn.Linear(3, 5), 0
        self.first, self.second, self.never = (nn.Parameter(torch.randn(5)) for _ in range(3))

    def forward(self, x):
        self.calls += 1
        return self.fc(x.mean((2, 3))) * (self.first, self.second)[1 - self.calls % 2].exp()


@pytest.mark.parametrize("method", ["sam", "gsam", "awp"])
@pytest.mark.parametrize("earlier", [False, True])
def test_parameters_of_one_pass_alone(method, earlier):
    model, (images, targets) = Odd().double(), batch(pixels=4)
    alpha, zero = 0.7 if method == "gsam" else 0.0, torch.zeros(5).double()
    hyper = {"gamma": 0.1} if method == "awp" else {"rho": 0.3} | ({"alpha": alpha} if alpha else {})
    clean = torch.autograd.grad(cross_entropy(model(images), targets), [*model.fc.parameters(), model.first])
    climbing = [clean[0]] if method == "awp" else clean
    size = torch.cat([g.flatten() for g in climbing]).norm()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        if method == "awp":
            moved.fc.weight += 0.1 * moved.fc.weight.norm() * clean[0] / size
        else:
            for p, g in zip([*moved.fc.parameters(), moved.first], clean):
                p += 0.3 * g / size
    perturbed = torch.autograd.grad(cross_entropy(moved(images), targets), [*moved.fc.parameters(), moved.second])
    g = {"fc.weight": clean[0], "fc.bias": clean[1], "first": clean[2], "second": zero}
    h = {"fc.weight": perturbed[0], "fc.bias": perturbed[1], "first": zero, "second": perturbed[2]}
    share = sum((g[n] * h[n]).sum() for n in g) / sum(h[n].square().sum() for n in h)
    want = {n: h[n] - alpha * (g[n] - share * h[n]) for n in g} | {"never": None}
    if earlier:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        want = {n: 1.0 if w is None else w + 1.0 for n, w in want.items()}
        want["never"] = torch.ones(5)
    model.calls = 0
    kept = {n: p.grad for n, p in model.named_parameters()}
    create_strategy(method, model, **hyper).accumulate_gradients(images, targets, cross_entropy)
    assert_same(gradients(model), want, tolerance=1e-12)
    assert not earlier or all(p.grad is kept[n] for n, p in model.named_parameters())  # in place, as buckets need it


@pytest.mark.parametrize("way", ["accumulate", "create_loss"])
@pytest.mark.parametrize("method", ["sam", "awp", "gsam"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_in_the_clean_gradient_stays_visible(method, bad, way, model, data):
    """A gradient scaler looks at p.grad alone; the second pass is finite here, since the weights did not move."""
    passes = []

    def criterion(output, targets):
        passes.append(1)
        return cross_entropy(output, targets) * (bad if len(passes) == 1 else 1.0)

    if way == "accumulate":
        create_strategy(method, model).accumulate_gradients(*data, criterion)
    else:
        create_loss(method, model, lambda model, part: criterion(model(part[0]), part[1]))(data).backward()
    assert len(passes) == 2 and not all(g.isfinite().all() for g in gradients(model).values())


def test_a_gradient_that_vanishes_leaves_all_of_the_other(model, data):
    """<g, u> u is zero where g_p is: the whole of g is orthogonal to it."""
    plain, passes = copy.deepcopy(model), []
    cross_entropy(plain(data[0]), data[1]).backward()

    def criterion(output, targets):
        passes.append(1)
        return cross_entropy(output, targets) * (len(passes) == 1)

    create_strategy("gsam", model, alpha=0.25).accumulate_gradients(*data, criterion)
    assert_same(gradients(model), {n: -0.25 * g for n, g in gradients(plain).items()}, tolerance=1e-5)


class Still(Perturbation):
    """Reads no gradient and moves nothing."""


def test_earlier_gradients_stay_where_no_perturbation_reads_them(model, data):
    plain = copy.deepcopy(model)
    cross_entropy(plain(data[0]), data[1]).backward()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    create_strategy([Still(model)], model, keeps_clean_gradient=False).accumulate_gradients(*data, cross_entropy)
    assert_same(gradients(model), {n: g + 1.0 for n, g in gradients(plain).items()}, tolerance=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("method", ["sam", "asam", "gsam", "awp"])
def test_gradients_in_another_layout_than_their_weights(method, layout):
    """They are paired by element, not by their place in memory."""
    found = []
    for turned in (False, True):
        model = build("test_byobnet").to(memory_format=layout)
        if turned:
            for p in model.parameters():
                p.grad = torch.zeros_like(p).mT.clone().mT if p.dim() > 1 else torch.zeros_like(p)
        step(model, *batch(), method, {})
        found.append(gradients(model))
    assert_same(*found, tolerance=1e-12)


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf"), 10**400, "0.1", True])
def test_alpha_out_of_range(alpha, model):
    with pytest.raises(ApartError, match=r"^alpha=.*: the share of the orthogonal part must be a finite number >= 0"):
        create_strategy("gsam", model, alpha=alpha)
    strategy = create_strategy("gsam", model, alpha=0.5)
    with pytest.raises(ApartError, match="alpha="):
        strategy.set(alpha=alpha, rho=0.3)
    assert strategy.hyper["rho"] == 0.04 and strategy.combination.alpha == 0.5


def test_alpha_is_set_between_steps(data):
    found = []
    for first in (0.0, 0.7):
        model = build("test_byobnet", dtype=torch.float32)
        strategy = create_strategy("gsam", model, alpha=first)
        strategy.set(alpha=0.7)
        strategy.accumulate_gradients(*data, cross_entropy)
        found.append(gradients(model))
    assert_same(*found, tolerance=0)
