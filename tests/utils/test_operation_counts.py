"""Operations are counted as they are dispatched, forwards and backwards; copies of activations beside them."""

import doctest
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf import METHODS, create_strategy, list_strategies
from apart_hf.utils import operation_counts
from apart_hf.utils.operation_counts import OperationCounts, count_operations
from tests.support.helpers import assert_same, batch, build, gradients, snapshot
from tests.support.oracle import HYPER, PIXELS, SCALE


class Plain(nn.Module):
    """A network of which every operation can be told by reading it."""

    def __init__(self, between=lambda x: x):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.between = between

    def forward(self, x):
        return self.fc(self.between(torch.relu(self.bn(self.conv(x)))).mean((2, 3)))


def step(model, rows=6, pixels=7):
    images, labels = batch(rows, pixels, dtype=torch.float32)
    return lambda: cross_entropy(model(images), labels).backward()


def test_a_forward_and_a_backward_operation_by_operation():
    found = count_operations(model := Plain(), step(model))
    for name in ["convolution", "native_batch_norm", "relu", "mean", "addmm", "_log_softmax", "nll_loss_forward"]:
        assert found.operations[name] == 1, name
    for name in ["nll_loss", "threshold", "native_batch_norm", "convolution"]:
        assert found.operations[f"{name}_backward"] == 1, name
    assert found.operations["mm"] == 2  # of the linear layer's two gradients
    assert not found.copies
    views = {"t", "view", "expand", "detach", "_unsafe_view", "transpose", "slice", "select", "permute", "unsqueeze"}
    assert not views & found.operations.keys()


def to_other_layout(x):
    return x.contiguous(memory_format=torch.channels_last)


BETWEEN = {
    "clone": (torch.clone, "clone"),
    "contiguous": (to_other_layout, "clone"),
    "_to_copy": (lambda x: x.to(torch.float64).to(torch.float32), "_to_copy"),
    "copy_": (lambda x: torch.empty_like(x).copy_(x), "copy_"),
    "view": (lambda x: x.view(3, 2, 4, 5, 5).transpose(0, 1).transpose(0, 1).view(6, 4, 5, 5), None),
    "folded and back": (lambda x: to_other_layout(x.view(2, 12, 5, 5)).contiguous().view(x.shape), "clone"),
    "of another size": (lambda x: x + x.mean().clone(), None),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_copies_of_activations(case):
    between, name = BETWEEN[case]
    with torch.no_grad():
        images, _ = batch(6, 7, dtype=torch.float32)
        plain, copying = (count_operations(one, lambda one=one: one(images)) for one in (Plain(), Plain(between)))
    assert not plain.copies
    assert copying.copies == Counter({name: copying.operations[name]} if name else {})
    assert copying.copies.total() == {"view": 0, "of another size": 0, "_to_copy": 2, "folded and back": 2}.get(case, 1)


def test_copies_of_weights_are_none_of_activations():
    """Whatever their size: here that of the activation itself."""
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU())
    images = torch.ones(6, 6)

    def call():
        model(images).sum().backward()
        kept = model[0].weight.detach().clone()
        model[0].weight.data.copy_(kept)
        model[0].weight.grad.clone()
        model(images).clone()

    found = count_operations(model, call)
    assert found.copies == Counter(clone=1) and found.operations["clone"] == 3


def test_the_second_pass_is_counted():
    model = build("small", dtype=torch.float32)
    counts, expected = {}, {}
    for method in list_strategies():
        where = {"layer": "conv1"} if method == "advbn" else {}
        strategy = create_strategy(method, model, **SCALE, **(HYPER | PIXELS).get(method, {}) | where)
        # two convolutions in each, and a smaller second pass has them, too
        expected[method] = 2 * METHODS[method].passes(**strategy.hyper | {"ratio": 1.0})
        with OperationCounts(model) as counts[method]:
            strategy.accumulate_gradients(*batch(8, 8, dtype=torch.float32), cross_entropy)
    plain = counts["standard"].operations
    assert plain["convolution"] == plain["convolution_backward"] == 2
    for method, found in counts.items():
        # the backwards of advbn's ascent end at its layer, the first of the two
        ends_early = METHODS["advbn"].hyper_parameters()["steps"] - 1 if method == "advbn" else 0
        assert found.operations["convolution"] == expected[method]
        assert found.operations["convolution_backward"] == expected[method] - ends_early
        assert method == "standard" or found.operations.total() > 1.9 * plain.total()


def test_counting_changes_nothing():
    found = []
    for counted in (True, False):
        model = build("small")
        strategy = create_strategy("apart", model, groups=2)
        before = snapshot(model)
        with OperationCounts(model) if counted else nullcontext():
            strategy.accumulate_gradients(*batch(8, 8), cross_entropy)
        assert snapshot(model) == before
        found.append(gradients(model))
    assert_same(*found, tolerance=0)


def test_hooks_go_where_a_step_fails():
    model = Plain()
    with pytest.raises(ValueError), OperationCounts(model) as counts:
        model(torch.ones(2, 3, 7, 7))
        raise ValueError
    assert counts.operations["convolution"] == 1 and not any(module._forward_hooks for module in model.modules())


def test_the_example_runs():
    found = doctest.testmod(operation_counts)
    assert found.attempted >= 4 and found.failed == 0


TRAFFIC = {  # of 10 x 10 float32 values, what is read and written
    "in place": (lambda a: a.add_(1.0), 400, 400),
    "two operands": (lambda a: a * a, 800, 400),
    "overwritten": (lambda a: a.copy_(a.clone()), 800, 800),
    "zeros": (lambda a: a.zero_(), 0, 400),
    "into another": (lambda a: torch.add(a, 1.0, out=torch.empty_like(a)), 400, 400),
    "lists": (lambda a: torch._foreach_add_([a, a[:1]], 1.0), 440, 440),
    "a repeated vector": (lambda a: a + a[0].expand(10, 10), 440, 400),
    "a view and memory": (lambda a: torch.empty_like(a.t()), 0, 0),
    "another dtype": (lambda a: a.to(torch.bfloat16), 400, 200),
    "a part": (lambda a: a[:, 1:3].sum(), 80, 4),
}


@pytest.mark.parametrize("case", TRAFFIC)
def test_what_operations_read_and_write(case):
    call, read, written = TRAFFIC[case]
    found = count_operations(nn.Identity(), lambda: call(torch.ones(10, 10).requires_grad_(False)))
    del found.written["ones"]
    assert (found.read.total(), found.written.total()) == (read, written)


def test_what_a_forward_and_a_backward_read_and_write():
    found = count_operations(model := Plain(), step(model))
    maps, images, weight = 4 * 6 * 4 * 5 * 5, 4 * 6 * 3 * 7 * 7, 4 * 4 * 3 * 3 * 3
    assert found.read["convolution"] == images + weight and found.written["convolution"] == maps
    assert found.read["convolution_backward"] == maps + images + weight
    assert found.written["convolution_backward"] == weight  # images have no gradient
    assert found.read["relu"] == found.written["relu"] == maps
    assert found.read["threshold_backward"] == 2 * maps and found.written["threshold_backward"] == maps
    vectors = 4 * 4
    assert found.read["native_batch_norm"] == maps + 4 * vectors  # gamma, beta, running statistics
    assert found.written["native_batch_norm"] == maps + 2 * vectors
