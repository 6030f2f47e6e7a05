"""The two passes as a loss under a gradient scaler, and in float16."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from apart_hf import create_loss
from tests.support.helpers import batch, build
from tests.support.loops import HYPER, loss_and_output
from tests.support.scaled_steps import check_steps_under_a_scaler


@pytest.mark.parametrize(
    "method, bad",
    [("standard", None), ("standard", 1), *((m, bad) for m in ("apart", "sam", "apart-sam") for bad in (None, 1, 2))],
)
def test_gradient_scaler(method, bad):
    """Steps are those without a scaler, bit for bit; an overflow in pass `bad` skips one, and lowers the scale."""

    def make(model, factor, scaler):
        def overflowing(model, part):
            loss, output = loss_and_output(model, part)
            return loss * factor(), output

        compute_loss = create_loss(method, model, overflowing, **HYPER[method])
        return lambda x, y: scaler.scale(compute_loss({"x": x, "y": y})[0]).backward(), []

    check_steps_under_a_scaler(make, bad)


def test_small_gradients_of_float16_do_not_vanish():
    """Inner passes are scaled: the clean gradient is of float16's smallest numbers, which alone would be zero."""

    def faint(model, part):
        return cross_entropy(model(part["x"]), part["y"]) * 2.0**-20

    found = []
    for half in (False, True):
        model = build("test_byobnet", dtype=torch.float32)
        x, y = batch(16, 32, dtype=torch.float32)
        compute_loss = create_loss("sam", model, faint, rho=0.0)
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = compute_loss({"x": x, "y": y})
        (loss * 2.0**20).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert ("scale" in compute_loss.state_dict()) == half
    assert torch.cosine_similarity(*found, dim=0) > 0.999


def test_an_overflow_of_float16_lowers_the_scale_and_is_handed_on():
    model, (x, y) = build("test_byobnet", dtype=torch.float32), batch(8, 16, dtype=torch.float32)
    sizes = iter([1.0, 2.0**20, 1.0])  # of the loss, in the clean pass and the perturbed pass of the first step
    compute_loss = create_loss("sam", model, lambda m, p: cross_entropy(m(p["x"]), p["y"]) * next(sizes, 1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scales = []
    for _ in range(2):
        before = copy.deepcopy(dict(model.named_parameters()))
        with torch.autocast("cpu", torch.float16):
            loss = compute_loss({"x": x, "y": y})
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(compute_loss.state_dict()["scale"][0])
        skipped = all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert skipped == (len(scales) == 1)
    assert scales == [2.0**11, 2.0**11]
    other = create_loss("sam", model, loss_and_output)
    other.load_state_dict(compute_loss.state_dict())
    assert other.state_dict() == compute_loss.state_dict()
