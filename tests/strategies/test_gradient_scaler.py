"""Scaled losses, as of float16: torch's GradScaler, scales of its own and of any size, and gradients that overflow."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from apart_hf import create_loss, create_strategy
from tests.support.helpers import assert_same, batch, build, gradients
from tests.support.oracle import FAMILY
from tests.support.scaled_steps import check_steps_under_a_scaler

NEW = ["advprop", "fast-advprop", "apart-advprop", "advbn", "awp", "gsam"]
# the first and the last pass of a step: those whose gradient the optimizer takes, so that the scaler sees an overflow
REACHING = {"advprop": (1, 4), "fast-advprop": (1, 2), "apart-advprop": (1, 3), "advbn": (1, 4), "awp": (1, 2)}
REACHING["gsam"] = (1, 2)


@pytest.mark.parametrize("as_loss", [False, True], ids=["strategy", "loss"])
@pytest.mark.parametrize("method, bad", [(m, bad) for m in NEW for bad in (None, *REACHING[m])])
def test_steps_are_those_without_a_scaler(method, bad, as_loss):
    """Bit for bit, of what the strategy holds as well; an overflow in pass `bad` skips a step and lowers the scale."""

    def make(model, factor, scaler):
        def criterion(output, targets):
            return cross_entropy(output, targets) * factor()

        made = {"generator": torch.Generator().manual_seed(5), **FAMILY[method]}
        if as_loss:
            loss = create_loss(method, model, lambda m, part: criterion(m(part[0]), part[1]), **made)
            return lambda *data: scaler.scale(loss(data)).backward(), list(loss.strategy.parameters())
        strategy = create_strategy(method, model, **made)
        backward = lambda loss: scaler.scale(loss).backward()  # noqa: E731
        step = lambda *data: strategy.accumulate_gradients(*data, criterion, backward=backward)  # noqa: E731
        return step, list(strategy.parameters())

    check_steps_under_a_scaler(make, bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [2.0**-20, 2.0**-10, 2.0**16, 2.0**24])
@pytest.mark.parametrize("method", FAMILY)
def test_gradients_are_in_proportion_to_any_scale(method, scale, dtype):
    """Directions of ascent are of unscaled gradients, however small or large the scale has made them."""
    found, data = [], batch(8, 12, dtype=dtype)
    for factor in (1.0, scale):
        model = build("small", dtype=dtype)
        strategy = create_strategy(method, model, generator=torch.Generator().manual_seed(5), **FAMILY[method])
        strategy.accumulate_gradients(*data, cross_entropy, backward=lambda loss, s=factor: (loss * s).backward())
        own = {f"own {i}": p.grad for i, p in enumerate(strategy.parameters())}
        found.append({name: g / factor for name, g in {**gradients(model), **own}.items()})
    assert_same(found[1], found[0], tolerance=0)


class NotFinite(torch.autograd.Function):
    """The identity, whose gradient has one entry that is not finite."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient.view(-1)[3] = ctx.value
        return gradient, None


VALUES = [float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("method", ["advprop", "fast-advprop", "apart-advprop"])
def test_no_pixel_moves_by_a_gradient_that_is_not_finite(method, value):
    """One entry is enough, an infinite one as well as NaN: after an overflow, the signs of the others mean nothing."""
    model = build("small")
    strategy = create_strategy(method, model, **FAMILY[method])
    strategy.accumulate(batch(8, 12), lambda part: cross_entropy(model(NotFinite.apply(part[0], value)), part[1]))
    assert strategy.figures()["pixel_delta"] == 0


@pytest.mark.parametrize("value", VALUES)
def test_no_feature_moves_by_a_gradient_that_is_not_finite(value):
    model = build("small")
    model.bn1.register_forward_pre_hook(lambda module, args: NotFinite.apply(args[0], value))
    strategy = create_strategy("advbn", model, **FAMILY["advbn"])
    strategy.accumulate_gradients(*batch(8, 12), cross_entropy)
    assert strategy.figures()["feature_delta"] == 0


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("method", ["apart", "apart-sam", "apart-advprop"])
def test_no_statistic_of_a_layer_moves_by_a_gradient_that_is_not_finite(method, value):
    """The layer whose gradient it is stays; one behind it, whose gradient is finite, is attacked."""
    model = build("small")
    model.bn1.register_forward_hook(lambda module, args, output: NotFinite.apply(output, value))
    strategy = create_strategy(method, model, **FAMILY[method])
    strategy.accumulate_gradients(*batch(8, 12), cross_entropy)
    deltas = strategy.perturbations[0]._fixed
    assert not any(delta.any() for delta in deltas["bn1"]) and all(delta.any() for delta in deltas["bn2"])


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("method", ["sam", "asam", "sam-on", "awp", "gsam"])
def test_no_weight_moves_by_a_gradient_that_is_not_finite(method, value):
    model, losses = build("small"), []
    model.bn2.register_forward_hook(lambda module, args, output: NotFinite.apply(output, value))

    def criterion(output, targets):
        losses.append(cross_entropy(output, targets))
        return losses[-1]

    create_strategy(method, model, **FAMILY[method]).accumulate_gradients(*batch(8, 12), criterion)
    assert torch.equal(*losses)
