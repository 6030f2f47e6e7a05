"""Gradients are clipped by timm's ways, once, on the combined gradient."""

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.utils import dispatch_clip_grad

from apart_hf.training.clipping import clip_gradients


@pytest.fixture
def models():
    """Two copies with the same gradients, some of them large."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=5)
        g = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        found.append(model)
    return found


def clipped(model, bound, mode):
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clip_gradients(accelerator, model, optimizer, bound, mode)
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("mode, bound", [("norm", 0.7), ("value", 0.3), ("agc", 0.02)])
def test_timm_s_way(mode, bound, models):
    ours, theirs = models
    before = [p.grad.clone() for p in theirs.parameters()]
    found = clipped(ours, bound, mode)
    parameters = list(theirs.parameters())
    dispatch_clip_grad(parameters[:-2] if mode == "agc" else parameters, bound, mode=mode)
    want = [p.grad for p in parameters]
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(found, want))
    assert any(not torch.equal(a, b) for a, b in zip(found, before))
    if mode == "norm":
        assert torch.sqrt(sum(g.square().sum() for g in found)).item() == pytest.approx(bound, rel=1e-4)
    elif mode == "value":
        assert max(g.abs().max().item() for g in found) == pytest.approx(bound)
    else:
        assert all(torch.equal(a, b) for a, b in zip(found[-2:], before[-2:]))  # the classifier's
        for p, g in zip(parameters[:-2], found):
            dims = tuple(range(1, p.ndim)) or None
            norms = [torch.linalg.vector_norm(t, dim=dims) for t in (p.detach(), g)]
            assert (norms[1] <= norms[0].clamp(min=1e-3) * bound * 1.001).all()


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_what_is_small_stays(mode, models):
    before = [p.grad.clone() for p in models[1].parameters()]
    assert all(torch.equal(a, b) for a, b in zip(clipped(models[0], 1e9, mode), before))
