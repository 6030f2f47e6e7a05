"""An optimizer's update with numbers of the device: what it does to strides, groups and states."""

import copy

import pytest
import torch
from torch import nn

from apart_hf.training.on_device import UpdateOnDevice

SHAPES = [(4, 1, 3, 3), (4, 6, 1, 1), (4, 6, 3, 3), (1, 4), (5,), ()]


def parameters():
    """In channels_last, with gradients in another layout, in which a dimension of size 1 has any stride."""
    g = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        values = torch.randn(shape, generator=g, dtype=torch.float64)
        p = nn.Parameter(values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values)
        p.grad = torch.randn(shape, generator=g, dtype=torch.float64)
        yield p


def one_layout(parameters, optimizer):
    kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor) and v.dim()]
    strides = {p.shape: p.stride() for p in parameters}
    return all(t.stride() == strides[t.shape] for t in [*kept, *(p.grad for p in parameters)])


def test_fused_updates_get_one_layout_and_the_same_numbers():
    """Also of momenta that an eager run has left."""
    ours, theirs = list(parameters()), list(parameters())
    options = {"lr": 2.0**-4, "momentum": 0.9, "weight_decay": 2.0**-6, "nesterov": True}
    optimizer, eager = torch.optim.SGD(ours, **options), torch.optim.SGD(theirs, **options)
    for step in range(4):
        update = UpdateOnDevice(optimizer)
        for one in (optimizer, eager):
            one.param_groups[0]["lr"] = 2.0 ** -(4 + step)
        update.refresh()
        eager.step()
        if step == 0:
            optimizer.step()
            assert not one_layout(ours, optimizer)  # so that the rest can fail
            continue
        with update.within():
            optimizer.step()
            assert one_layout(ours, optimizer)
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-14)
    assert optimizer.state_dict()["param_groups"] == eager.state_dict()["param_groups"]


def test_groups_are_what_they_were_after_an_exception():
    optimizer = torch.optim.AdamW(parameters(), lr=0.1)
    before = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    with pytest.raises(KeyError), UpdateOnDevice(optimizer).within():
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) and optimizer.param_groups[0]["capturable"]
        raise KeyError
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == before
