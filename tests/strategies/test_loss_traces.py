"""What the two passes as a loss leave behind: nothing on the model, also after an exception, and no memory."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from apart_hf import create_loss
from tests.support.helpers import batch, build, snapshot
from tests.support.loops import HYPER, loss_and_output


@pytest.mark.parametrize("method", HYPER)
def test_nothing_is_left_on_the_model(method, model, data):
    before = snapshot(model)
    compute_loss = create_loss(method, model, loss_and_output, **HYPER[method])
    weights = copy.deepcopy(dict(model.named_parameters()))
    loss, _ = compute_loss({"x": data[0], "y": data[1]})
    assert snapshot(model) == before and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    loss.backward()
    assert snapshot(model) == before
    pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("fails_in_call", [1, 2])
@pytest.mark.parametrize("method", ["apart", "sam", "apart-sam", "random-bn"])
@pytest.mark.parametrize("where", ["loss function", "model", "backward"])
def test_nothing_is_left_after_an_exception(where, method, fails_in_call, data):
    """Gradients that were there are there still, as the same tensors."""
    model, calls = build("small", dtype=torch.float32), []

    def fail(*_):
        calls.append(1)
        if len(calls) == fails_in_call:
            raise RuntimeError("of the user")

    def failing(model, part):
        loss, output = loss_and_output(model, part)
        if where == "loss function":
            fail()
        if where == "backward":
            loss.register_hook(fail)
        return loss, output

    if where == "model":
        model.conv2.register_forward_hook(fail)
    compute_loss = create_loss(method, model, failing, **HYPER[method])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, there = snapshot(model), [p.grad for p in model.parameters()]
    weights = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match="of the user"):
        compute_loss({"x": data[0], "y": data[1]})
    assert snapshot(model) == before and len(calls) == fails_in_call
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(p.grad is g and torch.equal(g, torch.ones_like(g)) for p, g in zip(model.parameters(), there))
    assert compute_loss.strategy.steps == 0
    compute_loss({"x": data[0], "y": data[1]})[0].backward()  # and it goes on


@pytest.mark.parametrize("method", ["apart", "sam"])
def test_p_grad_stays_none_where_a_plain_step_leaves_it(method):
    """Parameters that are frozen, or unused; earlier gradients are added to in place."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.unused = build("small"), nn.Linear(2, 2).double()
            self.inner.bn1.bias.requires_grad_(False)

        def forward(self, x):
            return self.inner(x)

    model, (x, y) = Net(), batch(8, 8)
    compute_loss = create_loss(method, model, loss_and_output, **HYPER[method])
    compute_loss({"x": x, "y": y})[0].backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == {
        "inner.bn1.bias",
        "unused.weight",
        "unused.bias",
    }
    there = model.inner.fc.weight.grad
    once = there.clone()
    compute_loss({"x": x, "y": y})[0].backward()
    assert model.inner.fc.weight.grad is there and torch.equal(there, 2 * once)


def test_both_passes_are_freed_with_the_loss():
    """What a pass computes is gone once its gradient is there, also where the loss is kept."""
    model, (x, y), seen = build("small"), batch(8, 8), []

    def watched(model, part):
        loss, output = loss_and_output(model, part)
        seen.append(weakref.ref(output))
        return loss

    loss = create_loss("apart", model, watched, **HYPER["apart"])({"x": x, "y": y})
    gc.collect()
    assert len(seen) == 2 and all(output() is None for output in seen)
    loss.backward()
