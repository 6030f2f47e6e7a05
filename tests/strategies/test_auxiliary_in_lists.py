"""Auxiliary BN in a list of methods: beside groups, beside weights that move, and where no clean gradient is kept."""

import copy
from typing import ClassVar

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf import METHODS, ApartError, Method, Perturbation, create_loss, create_strategy
from apart_hf.strategies.auxiliary_batchnorm import AuxiliaryBatchNorm
from apart_hf.strategies.bn_perturbations import GroupStatistics, RandomStatistics
from tests.support.helpers import assert_same, batch, build, gradients
from tests.support.oracle import SCALE

GROUPED = {"apart": {"epsilon": 0.1}, "random-bn": {"epsilon": 0.1}, "ghost-bn": {}}


@pytest.mark.parametrize("names", [["apart", "advprop"], ["advprop", "apart"]], ids="+".join)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_list_is_apart_advprop(names, steps):
    """Groups are normalised by statistics of their own, so that no auxiliary ones are held: the step is the same."""
    found, hyper = [], {"epsilon": 0.1, "groups": 4, "steps": steps, "ratio": 0.5, **SCALE}
    for method in ("apart-advprop", names):
        model = build("test_byobnet")
        strategy = create_strategy(method, model, generator=torch.Generator().manual_seed(2), **hyper)
        strategy.accumulate_gradients(*batch(16, 16), cross_entropy)
        found.append(gradients(model) | dict(model.named_buffers()))
        assert "auxiliary" not in strategy.state_dict() and "aux_affine" not in strategy.hyper
        assert not list(strategy.buffers())
    assert_same(found[1], found[0], tolerance=0)


@pytest.mark.parametrize("other", ["advprop", "advbn"])
@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("create", [create_strategy, lambda *a, **o: create_loss(*a, lambda m, b: m(b).mean(), **o)])
def test_an_auxiliary_gamma_beside_groups_is_refused(create, name, other):
    model = build("test_resnet")
    with pytest.raises(ApartError, match=r"aux_affine= is given for auxiliary BN.* leave aux_affine out") as caught:
        create([name, other], model, aux_affine=True, epsilon=0.1)
    assert "\n" not in str(caught.value)
    groups = GroupStatistics(model, groups=2)
    strategy = create_strategy([groups, other], model)
    assert strategy.perturbations[0] is groups and not list(strategy.buffers())


class Shared(Perturbation):
    """Does nothing, with a hyper-parameter of a name that others have, too."""

    defaults: ClassVar = {"epsilon": 0.1}
    shareable = True

    def __init__(self, model, *, epsilon):
        super().__init__(model)
        self.epsilon = epsilon


@pytest.mark.parametrize("names", [["apart", "mine"], ["mine", "advprop", "apart"]], ids="+".join)
def test_what_else_methods_share_stays_beside_groups(names, monkeypatch):
    monkeypatch.setitem(METHODS, "mine", Method("of a user", (Shared,)))
    strategy = create_strategy(names, build("small"), epsilon=0.2, groups=4, **SCALE)
    found = {type(p).__name__: p for p in strategy.perturbations}
    assert found["Shared"].epsilon == strategy.hyper["epsilon"] == 0.2 and "AuxiliaryBatchNorm" not in found
    strategy.set(epsilon=0.3)
    assert found["Shared"].epsilon == found["AdversarialStatistics"].epsilon == 0.3


UNUSED = {  # what is given beside auxiliary BN of the user's own, and what the message then says
    "groups by name": (lambda model: ["apart"], "given beside AdversarialStatistics, which normalises groups"),
    "groups": (lambda model: [GroupStatistics(model, groups=2)], "given beside GroupStatistics, which normalises"),
    "another by name": (lambda model: ["advprop"], "AuxiliaryBatchNorm is in the list twice"),
    "another": (lambda model: [AuxiliaryBatchNorm(model, aux_affine=False)], "2 objects AuxiliaryBatchNorm are given"),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("beside", UNUSED)
def test_auxiliary_statistics_that_no_pass_would_update_are_refused(beside, turned):
    model = build("small")
    others, message = UNUSED[beside]
    wanted = [AuxiliaryBatchNorm(model, aux_affine=False), *others(model)]
    with pytest.raises(ApartError, match=message) as caught:
        create_strategy(wanted[::-1] if turned else wanted, model, **SCALE)
    assert "\n" not in str(caught.value)


def test_a_method_of_a_user_with_statistics_that_no_pass_would_update_is_refused(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", Method("of a user", (AuxiliaryBatchNorm, RandomStatistics)))
    with pytest.raises(ApartError, match="given beside RandomStatistics, which normalises groups"):
        create_strategy("mine", build("small"))


@pytest.mark.parametrize("other", ["advprop", "advbn"])
def test_auxiliary_statistics_stay_where_nothing_groups(other):
    strategy = create_strategy(["sam", other], build("test_resnet", dtype=torch.float32))
    before = [tensor.clone() for tensor in strategy.buffers()]
    strategy.accumulate_gradients(*batch(8, 32, dtype=torch.float32), cross_entropy)
    assert before and not any(torch.equal(a, b) for a, b in zip(before, strategy.buffers()))


def moved_step(kind, name, p, g, sizes, rho):
    """SAM's step in a parameter, ASAM's or SAM-ON's; `sizes`: the norm of T g over all that take part."""
    if kind == "sam-on" and "bn" not in name:
        return torch.zeros_like(p)
    t = p.abs() + 0.01 if kind == "asam" and name.endswith("weight") else torch.ones_like(p)
    return rho * t * t * g / sizes


def naive(model, own, images, targets, kind, rho, steps):
    """The gradients of the model and of the auxiliary gamma and beta, written out for a network of two BN layers."""
    mean, std = (torch.tensor(SCALE[key], dtype=torch.float64).view(3, 1, 1) for key in ("mean", "std"))
    unit, black, white = 1 / (255 * std), (0 - mean) / std, (1 - mean) / std
    names = [name for name, _ in model.named_parameters()]
    clean, double = copy.deepcopy(model), copy.deepcopy(model)
    double.load_state_dict(own, strict=False)
    phi, psi = list(clean.parameters()), list(double.parameters())
    x = images.clone().requires_grad_()
    *g, g_x = torch.autograd.grad(cross_entropy(clean(x), targets), [*phi, x])
    ones = [torch.ones_like(p) for p in phi]
    if kind == "asam":
        ones = [p.abs() + 0.01 if n.endswith("weight") else t for n, p, t in zip(names, phi, ones)]
    taking = [t * part for n, part, t in zip(names, g, ones) if kind != "sam-on" or "bn" in n]
    size = torch.sqrt(sum(part.square().sum() for part in taking))
    with torch.no_grad():
        for name, p, moved, part in zip(names, phi, psi, g):
            moved += moved_step(kind, name, p, part, size, rho)
    bounds = (
        torch.maximum(-4 * unit, black - images).clamp(max=0),
        torch.minimum(4 * unit, white - images).clamp(min=0),
    )
    d = (unit * g_x.sign()).clamp(*bounds)
    for _ in range(steps - 1):
        at = (images + d).requires_grad_()
        (g_x,) = torch.autograd.grad(cross_entropy(double(at), targets), at)
        d = (d + unit * g_x.sign()).clamp(*bounds)
    h = torch.autograd.grad(cross_entropy(double(images + d), targets), psi)
    shared = {n: (a / 2 if n in own else (a + b) / 2) for n, a, b in zip(names, g, h)}
    return shared, {n: b / 2 for n, b in zip(names, h) if n in own}


@pytest.mark.parametrize("sleeps", [False, True], ids=["", "a layer in eval mode"])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind, rho", [("sam", 0.2), ("asam", 0.5), ("sam-on", 0.5)])
def test_weights_that_move_move_the_auxiliary_gamma_and_beta(kind, rho, steps, first, sleeps):
    """By the step of those in whose place they are, whichever of the two comes first; after it they are as before."""
    model, (images, targets) = build("small"), batch(8, 12)
    names = [kind, "advprop"] if first == 0 else ["advprop", kind]
    strategy = create_strategy(names, model, rho=rho, steps=steps, aux_affine=True, **SCALE)
    (auxiliary,) = (p for p in strategy.perturbations if isinstance(p, AuxiliaryBatchNorm))
    with torch.no_grad():
        for p in strategy.parameters():
            p.add_(torch.linspace(-0.2, 0.3, p.numel(), dtype=p.dtype))
    if sleeps:
        model.bn2.eval()
    own = {name: p.detach().clone() for name, p in auxiliary.named_parameters()}
    used = {name: p for name, p in own.items() if not (sleeps and name.startswith("bn2"))}
    want, found = naive(model, used, images, targets, kind, rho, steps)
    strategy.accumulate_gradients(images, targets, cross_entropy)
    assert_same(gradients(model), want)
    assert len(found) == (2 if sleeps else 4)
    assert_same({name: dict(auxiliary.named_parameters())[name].grad for name in found}, found)
    assert all(torch.equal(p, own[name]) for name, p in auxiliary.named_parameters())


@pytest.mark.parametrize("kind", ["sam", "awp"])
def test_the_step_goes_with_the_model_to_another_type(kind):
    """The model may move after its strategy was made."""
    model = build("small")
    strategy = create_strategy([kind, "advprop"], model, aux_affine=True, steps=2, **SCALE)
    model.float()
    strategy.accumulate_gradients(*batch(8, 12, dtype=torch.float32), cross_entropy)
    assert all(p.dtype == torch.float32 and p.grad.any() for p in strategy.parameters())
    assert all(t.dtype in (torch.float32, torch.int64) for t in strategy.buffers())


@pytest.mark.parametrize("names", [["sam", "advprop"], ["advprop"], ["advbn"]], ids="+".join)
def test_an_auxiliary_gamma_without_the_clean_gradient_is_refused(names):
    """The model's own would be in no pass that trains it; without the option, all is trained."""
    model = build("test_resnet", dtype=torch.float32)
    with pytest.raises(ApartError, match="aux_affine=True: the perturbed pass alone is trained on") as caught:
        create_strategy(names, model, keeps_clean_gradient=False, aux_affine=True)
    assert "\n" not in str(caught.value)
    strategy = create_strategy(names, model, keeps_clean_gradient=False)
    strategy.accumulate_gradients(*batch(8, 32, dtype=torch.float32), cross_entropy)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert all(m.weight.grad.any() for m in norms)
