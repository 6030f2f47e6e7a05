"""Auxiliary BatchNorm against the oracle: a gamma and beta of its own, layers that are frozen, its state."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf import ApartError, create_strategy
from tests.reference import reference_images_step
from tests.support.helpers import assert_same, batch, build, gradients
from tests.support.oracle import PIXELS, SCALE, check_images

ADVPROP = {"steps": 2, **SCALE}


@pytest.mark.parametrize("method", ["advprop", "fast-advprop"])
@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "bn1d", "tokens"])
def test_gamma_and_beta_of_their_own(name, method):
    """Two steps, and the auxiliary gamma and beta have left the model's before: the second one tells them apart."""
    model, data = build(name), batch(pixels=16)
    hyper = PIXELS[method] | {"aux_affine": True}
    strategy = check_images(model, *data, method, hyper)
    with torch.no_grad():
        for p in strategy.parameters():
            p.add_(torch.linspace(-0.2, 0.3, p.numel(), dtype=p.dtype))
    held, model.grad = strategy.state_dict()["auxiliary"], None
    for p in (*model.parameters(), *strategy.parameters()):
        p.grad = None
    other = torch.Generator()
    other.set_state(strategy.generator.get_state())
    want, buffers, own, after = reference_images_step(
        model, *data, cross_entropy, method, auxiliary=held, generator=other, **SCALE, **hyper
    )
    strategy.accumulate_gradients(*data, cross_entropy)
    assert_same(gradients(model), want)
    (auxiliary,) = strategy.perturbations[1:]
    assert own and len(own) == len(list(strategy.parameters()))
    assert_same({n: p.grad for n, p in auxiliary.named_parameters()}, own)
    assert_same({n: t.double() for n, t in auxiliary.state_dict().items()}, {n: t.double() for n, t in after.items()})
    assert_same({n: b.double() for n, b in model.named_buffers()}, {n: b.double() for n, b in buffers.items()})


@pytest.mark.parametrize("aux_affine", [False, True])
def test_frozen_gamma_and_layers(aux_affine):
    model = build("test_resnet")
    for i, layer in enumerate(m for m in model.modules() if isinstance(m, _BatchNorm)):
        layer.weight.requires_grad_(i % 3 != 0)
        layer.train(i % 4 != 1)
    strategy = create_strategy("advprop", model, aux_affine=aux_affine, **ADVPROP)
    layers = strategy.perturbations[1].layers
    asleep = {n for n, layer in layers.items() if not layer.training}
    before = strategy.state_dict()["auxiliary"]
    data = batch(pixels=16)
    want, buffers, own, _ = reference_images_step(
        model, *data, cross_entropy, "advprop", steps=2, aux_affine=aux_affine, **SCALE
    )
    strategy.accumulate_gradients(*data, cross_entropy)
    assert asleep
    # a frozen layer is the model's own in all passes
    shared = {n: (want[n] + own[n] if n in own and n.rpartition(".")[0] in asleep else want[n]) for n in want}
    assert_same(gradients(model), shared)
    assert_same({n: b.double() for n, b in model.named_buffers()}, {n: b.double() for n, b in buffers.items()})
    for name, value in strategy.state_dict()["auxiliary"].items():
        layer, _, kind = name.rpartition(".")
        assert torch.equal(value, before[name]) == (layer in asleep or kind in ("weight", "bias"))


def test_balanced_updates_where_layers_are_frozen():
    """Both passes reach the gamma and beta of a layer in eval mode, so that they are balanced as all others."""
    model, data = build("test_resnet"), batch(pixels=16)
    asleep = set()
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)][::2]:
        layer.eval()
        asleep |= {f"{name}.weight", f"{name}.bias"}
    hyper = {**PIXELS["fast-advprop"], **SCALE}
    wanted = [
        reference_images_step(
            model,
            *data,
            cross_entropy,
            "fast-advprop",
            **hyper | {"aux_affine": aux_affine},
            generator=torch.Generator().manual_seed(1),
        )[0]
        for aux_affine in (False, True)
    ]
    strategy = create_strategy(
        "fast-advprop", model, **hyper | {"aux_affine": True}, generator=torch.Generator().manual_seed(1)
    )
    strategy.accumulate_gradients(*data, cross_entropy)
    assert_same(gradients(model), {n: wanted[n not in asleep][n] for n in wanted[0]})


def test_aux_affine_needs_a_batchnorm_and_is_decided_once():
    without = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    with pytest.raises(ApartError, match=r"aux_affine=True: Sequential has no BatchNorm layer"):
        create_strategy("advprop", without, aux_affine=True, **SCALE)
    model = build("small")
    strategy = create_strategy("advprop", model, **ADVPROP)
    with pytest.raises(ApartError, match="aux_affine=True: it is decided as the strategy is made"):
        strategy.set(aux_affine=True)
    assert not strategy.hyper["aux_affine"] and not list(strategy.parameters())
    other = create_strategy("advprop", model, aux_affine=True, **ADVPROP)
    with pytest.raises(ApartError, match="aux_affine"):
        strategy.load_state_dict(other.state_dict())
    strategy.set(pixel_epsilon=2, steps=1)
    assert strategy.perturbations[0].pixel_epsilon == 2 and strategy.passes == 2


def test_state_goes_on_where_it_was():
    """Statistics, gamma and beta of auxiliary BN are in the state, the generator as well: the next step is the same."""
    data = batch(8, 12)

    def make(model):
        generator = torch.Generator().manual_seed(3)
        hyper = {"random_start": True, "ratio": 0.5, "aux_affine": True, "generator": generator}
        return create_strategy("advprop", model, **ADVPROP | hyper)

    def step(model, strategy):
        optimizer = torch.optim.SGD([*model.parameters(), *strategy.parameters()], lr=0.1)
        strategy.accumulate_gradients(*data, cross_entropy)
        optimizer.step()

    model = build("small")
    first = make(model)
    step(model, first)
    model.zero_grad()
    other = copy.deepcopy(model)
    second = make(other)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p in first.parameters():
        p.grad = None
    for one, strategy in ((model, first), (other, second)):
        step(one, strategy)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    a, b = (strategy.state_dict()["auxiliary"] for strategy in (first, second))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["bn1.weight"], model.bn1.weight)
    with pytest.raises(ApartError, match="auxiliary BatchNorm is of another model"):
        make(build("test_resnet")).load_state_dict(first.state_dict())


def test_layers_that_share_gamma_share_the_auxiliary_one():
    model = build("small")
    model.bn2.weight = model.bn1.weight
    strategy = create_strategy("advprop", model, aux_affine=True, **ADVPROP)
    assert len(list(strategy.parameters())) == 3 == len({id(p) for p in strategy.parameters()})
    strategy.accumulate_gradients(*batch(8, 12), cross_entropy)
    assert all(p.grad.any() for p in strategy.parameters())


def test_a_halved_ordinary_pass_is_one_also_for_balanced_updates(monkeypatch):
    """What other processes await: a batch that does not fit takes an ordinary pass in two halves."""
    monkeypatch.setattr("apart_hf.strategies.algorithm.processes", lambda: 2)
    model, (images, targets) = build("small"), batch(6, 12)
    plain = copy.deepcopy(model)
    cross_entropy(plain(images), targets).backward()
    strategy = create_strategy("fast-advprop", model, uneven="plain", aux_affine=True, **SCALE)
    strategy.accumulate_gradients(images, targets, cross_entropy)
    assert_same(gradients(model), gradients(plain))
