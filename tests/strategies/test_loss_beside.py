"""Parameters beside the model that the two passes as a loss reach, gradients that share memory, and hooks."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf import create_loss, create_strategy
from tests.reference import reference_step
from tests.support.helpers import assert_same, batch, build, gradients
from tests.support.loops import HYPER, loss_and_output


def warm(model, part, temperature):
    return cross_entropy(model(part[0]) / temperature, part[1])


def beside(way, method, x, y):
    """The gradients of a model, of a temperature in the loss function, and of images, all times a quarter."""
    model, images = build("small"), x.clone().requires_grad_()
    temperature = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    if way == "create_loss":
        loss = create_loss(method, model, lambda m, part: warm(m, part, temperature), **HYPER[method])((images, y))
        assert temperature.grad is None and images.grad is None
        (0.25 * loss).backward()
    else:
        strategy = create_strategy(method, model, **HYPER[method])
        quarter = lambda loss: (0.25 * loss).backward()  # noqa: E731
        strategy.accumulate((images, y), lambda part: warm(model, part, temperature), backward=quarter)
    return gradients(model) | {"temperature": temperature.grad, "images": images.grad}


@pytest.mark.parametrize("method", ["standard", "apart", "sam", "apart-sam"])
def test_what_is_trained_beside_the_model(method):
    """It gets its gradient once, and scaled; by SAM, which keeps none of the clean pass, that of the perturbed one."""
    x, y = batch(8, 8)
    want = beside("accumulate", method, x, y)
    assert_same(beside("create_loss", method, x, y), want, tolerance=1e-14)
    if method == "sam":
        model, temperature = build("small"), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        clean = torch.autograd.grad(warm(model, (x, y), temperature), list(model.parameters()))
        norm = torch.sqrt(sum(g.square().sum() for g in clean))
        with torch.no_grad():
            for p, g in zip(model.parameters(), clean):
                p += HYPER["sam"]["rho"] * g / norm
        (0.25 * warm(model, (x, y), temperature)).backward()
        assert torch.allclose(temperature.grad, want["temperature"], rtol=1e-10)


class Stored(torch.autograd.Function):
    """Its gradient is a tensor that the caller keeps."""

    @staticmethod
    def forward(ctx, p, stored):
        ctx.stored = stored
        return (p * stored).sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.stored, None


@pytest.mark.parametrize("method", ["apart", "sam"])
def test_gradients_that_share_their_memory(method):
    """Of two parameters that are added, and of one whose gradient somebody else holds."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("small")
            self.a, self.b, self.c = (nn.Parameter(torch.zeros(5).double()) for _ in range(3))
            self.stored = torch.ones(5).double()

        def forward(self, x):
            return self.inner(x) + (self.a + self.b) + Stored.apply(self.c, self.stored)

    found, (x, y) = [], batch(8, 8)
    for way in ("accumulate", "create_loss"):
        model = Net()
        if way == "accumulate":
            create_strategy(method, model, **HYPER[method]).accumulate_gradients(x, y, cross_entropy)
        else:
            create_loss(method, model, loss_and_output, **HYPER[method])({"x": x, "y": y})[0].backward()
        assert torch.equal(model.stored, torch.ones(5).double())
        found.append(gradients(model))
    assert_same(*found, tolerance=0)


def test_hooks_that_step_an_optimizer_see_the_finished_gradient():
    """torch's post-accumulate hooks, which fused optimizers step in, fire once a backward."""
    model, (x, y) = build("small"), batch(8, 8)
    want, _, _ = reference_step(model, x, y, cross_entropy, "apart", **HYPER["apart"])
    seen = {}
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.setdefault(name, []).append(p.grad.clone()))
    loss, _ = create_loss("apart", model, loss_and_output, **HYPER["apart"])({"x": x, "y": y})
    assert not seen
    loss.backward()
    assert all(len(found) == 1 for found in seen.values())
    assert_same({name: found[0] for name, found in seen.items()}, want)
