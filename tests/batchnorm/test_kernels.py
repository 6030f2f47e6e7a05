"""Every kernel and memory layout of grouped batch normalisation against the naive formula, in float64 and float32."""

import pytest
import torch

from apart_hf.batchnorm import cpu_kernels, device_kernels, runs_of_samples, use_kernels
from apart_hf.batchnorm.functional import perturbed_batch_norm
from apart_hf.batchnorm.layouts import Grouping
from apart_hf.utils.operation_counts import OperationCounts
from tests.support.helpers import batch, build
from tests.support.oracle import check

SHAPES = {
    "nchw": (8, 3, 5, 4),
    "channels_last": (8, 3, 5, 4),
    "tokens": (24, 3),
    "windows": (16, 3, 2, 2),
    "sequence": (8, 3, 7),
    "video": (8, 3, 2, 3, 2),
}


def naive(x, gamma, beta, delta_mu, delta_sigma, eps, groups, rows, blocks):
    """Each group by itself, and put back where its samples were."""
    samples = len(x) // rows
    per_sample = x.reshape(samples, rows, *x.shape[1:])
    out = torch.empty_like(per_sample)
    for k in range(groups):
        mine = slice(k * samples // groups, (k + 1) * samples // groups) if blocks else slice(k, None, groups)
        part = per_sample[mine].flatten(0, 1)
        dims, vector = [d for d in range(part.dim()) if d != 1], [1, -1] + [1] * (part.dim() - 2)
        mu, var = part.mean(dims), part.var(dims, correction=0)
        sigma = (var + eps).sqrt()
        shifted = (part - mu.view(vector)) / sigma.view(vector) - (delta_mu * (mu / sigma).detach()).view(vector)
        y = (gamma * (1 + delta_sigma)).view(vector) * shifted + beta.view(vector)
        out[mine] = y.view(-1, rows, *x.shape[1:])
    return out.view_as(x)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("kernels", ["cpu", "rows", "compiled", "device", "composed"])
@pytest.mark.parametrize("blocks", [False, True], ids=["interleaved", "blocks"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", SHAPES)
def test_agrees_with_the_naive_formula(layout, groups, blocks, kernels, dtype, tolerance, monkeypatch):
    if kernels == "compiled":  # where no tensor has values
        monkeypatch.setattr(cpu_kernels, "is_real", lambda _: False)
    if kernels == "composed":  # of every layout
        monkeypatch.setattr(device_kernels, "has_runs", lambda *_: True)
    g = torch.Generator().manual_seed(0)
    shape = SHAPES[layout]
    rows = shape[0] // 8
    values = [
        torch.randn(shape, generator=g, dtype=torch.float64) * 2 + 1,
        *(torch.randn(3, generator=g, dtype=torch.float64) for _ in range(4)),
    ]
    weights = torch.randn(shape, generator=g, dtype=torch.float64)
    if layout == "channels_last":
        values[0], weights = (t.contiguous(memory_format=torch.channels_last) for t in (values[0], weights))
    want_in = [v.clone().requires_grad_() for v in values]
    want = naive(*want_in, 1e-3, groups, rows, blocks)
    (want * weights).sum().backward()

    got_in = [v.to(dtype).requires_grad_() for v in values]
    with use_kernels({"compiled": "cpu", "composed": "device"}.get(kernels, kernels)):
        got = perturbed_batch_norm(*got_in, eps=1e-3, grouping=Grouping(groups, rows, blocks))
        (got * weights.to(dtype)).sum().backward()
    assert got.stride() == want.stride() and got.dtype == dtype
    for a, b in zip([got, *(t.grad for t in got_in)], [want, *(t.grad for t in want_in)]):
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    with torch.no_grad():
        got.relu_()  # an in-place activation may follow


GRADIENTS = {
    "alike": lambda out: torch.randn_like(out),
    "contiguous": lambda out: torch.randn(out.shape, dtype=out.dtype),
    "one number": lambda out: torch.randn((), dtype=out.dtype).expand(out.shape),
    "every second": lambda out: torch.randn(2 * len(out), *out.shape[1:], dtype=out.dtype)[::2],
    "zero": lambda out: torch.zeros_like(out),
}


@pytest.mark.parametrize("needs_grad_x", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(
    "shape", [(1, 3, 5, 7), (2, 3), (15, 3, 3, 1), (17, 3, 1, 3), (31, 3), (33, 3, 7, 5), (17, 3, 8, 6)], ids=str
)
def test_one_group_is_cut_into_runs_of_any_size(shape, gradient, needs_grad_x, monkeypatch):
    """Where channels lie innermost: sixteen does not divide the samples, and gradients lie as they will."""
    parts = []
    own = runs_of_samples._sums_first
    monkeypatch.setattr(runs_of_samples, "_sums_first", lambda *a: parts.append(a[1]) or own(*a))
    torch.manual_seed(0)
    values = [torch.randn(shape, dtype=torch.float64) * 2 + 1, *torch.randn(2, 3, dtype=torch.float64)]
    if len(shape) == 4:
        values[0] = values[0].contiguous(memory_format=torch.channels_last)
    values += [torch.zeros(3, dtype=torch.float64) for _ in range(2)]
    both = [[v.clone().requires_grad_(needs_grad_x or k > 0) for k, v in enumerate(values)] for _ in range(2)]
    want = naive(*both[0], 1e-3, 1, 1, False)
    got = perturbed_batch_norm(*both[1], eps=1e-3, shifted=False)
    top = GRADIENTS[gradient](want)
    kept = top.clone()
    for out in (want, got):
        out.backward(top)
    assert len(parts) == 1 and torch.equal(top, kept)
    for a, b in zip(both[1], both[0]):
        assert (a.grad is None) == (b.grad is None)
        assert b.grad is None or (a.grad - b.grad).abs().max() <= 1e-12 * max(1.0, float(b.grad.abs().max()))
    assert not needs_grad_x or both[1][0].grad.stride() == values[0].stride()


def test_large_means_keep_their_digits():
    """float32 statistics of activations far from zero: as exact as the framework's own kernels."""
    x = (torch.randn(16, 4, 6, 6, generator=torch.Generator().manual_seed(0)) + 300).contiguous(
        memory_format=torch.channels_last
    )
    ones, zeros = torch.ones(4), torch.zeros(4)
    want = torch.cat([torch.nn.functional.batch_norm(part, None, None, training=True) for part in x.chunk(2)])
    got = perturbed_batch_norm(x, ones, zeros, zeros, zeros, eps=1e-5, grouping=Grouping(2, blocks=True))
    assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(8, 3, 7, 5), (8, 3, 40), (6, 3, 3, 4, 3), (8, 3, 5, 4), (8, 3)])
def test_running_statistics_of_rows_differ_by_rounding_and_others_do_not(shape):
    """In float64: those of "rows" from the definition, all others are bit for bit `F.batch_norm`'s."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 2 + 30
    gamma, beta = (torch.randn(3, generator=g, dtype=torch.float64) for _ in range(2))
    zeros, before = torch.zeros(3, dtype=torch.float64), torch.rand(2, 3, generator=g, dtype=torch.float64)
    plain = before.clone()
    want = torch.nn.functional.batch_norm(x, *plain, gamma, beta, training=True, momentum=0.3, eps=1e-3)
    per_channel = x.transpose(0, 1).flatten(1)
    defined = torch.stack([per_channel.mean(1), per_channel.var(1)]) * 0.3 + before * 0.7
    found = {}
    for kernels in ("auto", "cpu", "rows"):
        found[kernels] = before.clone()
        with use_kernels(kernels), OperationCounts(torch.nn.Identity()) as counts:
            got = perturbed_batch_norm(
                x, gamma, beta, zeros, zeros, eps=1e-3, buffers=tuple(found[kernels]), momentum=0.3, shifted=False
            )
        assert (got - want).abs().max() <= 1e-10 * want.abs().max()
        is_long = len(shape) > 2 and x[0, 0].numel() >= 32
        assert bool(counts.operations["linalg_vector_norm"]) == (kernels == "rows" and is_long)
    assert torch.equal(found["auto"], plain) and torch.equal(found["cpu"], plain)
    assert (found["rows"] - defined).abs().max() <= 1e-10 * defined.abs().max()
    assert (found["rows"] - plain).abs().max() <= 1e-13 * plain.abs().max()


def test_a_step_by_rows_is_that_of_the_oracle():
    with use_kernels("rows"):
        check(build("test_resnet"), *batch(8), "apart", {"groups": 2, "epsilon": 0.1})
