"""Batches and networks at the edge of what normalisation and SAM are defined for: finite, and as the oracle has it."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf.strategies import methods as table
from apart_hf.strategies.weight_perturbations import Weights
from tests.support.helpers import batch, build, gradients
from tests.support.oracle import HYPER, check, step

METHODS = ["standard", *HYPER]
CLIMBING = [name for name in METHODS if any(issubclass(p, Weights) for p in table.METHODS[name].perturbations)]
DEAD = 3  # a channel


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]


def hyper(method):
    return HYPER.get(method, {})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["test_byobnet", "bn1d"])
def test_gamma_and_beta_zero(name, method):
    """delta_sigma is zero where gamma is: its gradient is gamma times that of gamma."""
    model = build(name)
    with torch.no_grad():
        for layer in norms(model):
            layer.weight[::2] = 0.0
            layer.bias.zero_()
    deltas = check(model, *batch(), method, hyper(method))
    if "apart" in method:
        assert all(not sigma[::2].any() for (_, sigma), _ in zip(deltas.values(), norms(model)))
        assert any(sigma[1::2].any() for _, sigma in deltas.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_a_dead_channel(constant, method):
    """Its variance is zero: mu / sigma is `constant` / sqrt(eps), about 949 for 3."""
    model = build("bn1d")
    with torch.no_grad():
        for layer in (model.conv, model.fc1, model.fc2):
            layer.weight[DEAD] = 0.0
            layer.bias[DEAD] = constant
    check(model, *batch(), method, hyper(method), tolerance=1e-8)  # rounding in mu / sigma counts a thousandfold
    if method == "sam-on" or method not in CLIMBING:  # else it is not dead in the second pass
        assert not gradients(model)["bn1.weight"][DEAD]
    assert torch.isfinite(torch.cat([g.flatten() for g in gradients(model).values()])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_all_images_are_one_colour(method, dtype):
    """Every channel of the layers behind the average has variance zero."""
    model, (images, targets) = build("bn1d", dtype=dtype), batch(dtype=dtype)
    images = images[:1, :, :1, :1].expand_as(images)
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss, _ = step(model, images, targets, method, hyper(method))
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients(model).values())
    assert gradients(model)["fc3.bias"].any()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("method", CLIMBING)
def test_sam_climbs_nowhere_without_a_gradient(method):
    """rho g / ||g|| with g = 0: no step, so the second pass is at the weights themselves."""
    model, (images, targets) = build("test_byobnet"), batch()
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = []

    def criterion(output, targets):
        losses.append(cross_entropy(output, targets))
        return losses[-1] * (len(losses) > 1)  # flat in the first pass

    step(
        model,
        images,
        targets,
        method,
        hyper(method) | ({"epsilon": 0.0, "groups": 1} if "apart" in method else {}),
        criterion,
    )
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    assert all(g.isfinite().all() for g in gradients(model).values())
    assert gradients(model)["head.fc.weight"].any()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_asam_where_no_weight_has_a_size():
    """T = |w| + eta is zero with both; parameters of another name have T = 1 and move alone."""
    model = build("bn1d")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "weight" in name and "fc3" not in name:
                p.zero_()
    check(model, *batch(), "asam", {"rho": 0.5, "eta": 0.0})
