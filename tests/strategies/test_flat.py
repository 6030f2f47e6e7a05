"""Lists of tensors as pieces of one: in any layout they are paired by element, and nothing is lost."""

import pytest
import torch

from apart_hf.strategies.flat import flat_copy, safe_ratio
from apart_hf.utils.operation_counts import OperationCounts


def layouts():
    g = torch.Generator().manual_seed(0)
    made = torch.randn(4, 3, 5, 5, generator=g), torch.randn(6, 4, generator=g), torch.randn((), generator=g)
    return {
        "contiguous": list(made),
        "channels_last": [made[0].to(memory_format=torch.channels_last), made[1], made[2]],
        "transposed": [made[0].transpose(0, 3).contiguous().transpose(0, 3), made[1].T.contiguous().T, made[2]],
        "with gaps": [torch.stack([made[0], made[0]], -1)[..., 0], torch.cat([made[1], made[1]], 1)[:, :4], made[2]],
        "expanded": [made[0][:1].expand(4, 3, 5, 5), made[1][:, :1].expand(6, 4), made[2]],
        "empty": [made[0][:0], made[1][:, :1], made[2].view(1, 1)],
    }


@pytest.mark.parametrize("like", layouts())
@pytest.mark.parametrize("layout", layouts())
def test_pieces_are_the_tensors_in_the_layout_of_others(layout, like):
    tensors, fellows = layouts()[layout], layouts()[like]
    if [t.shape for t in tensors] != [t.shape for t in fellows]:
        fellows = tensors
    before = [t.clone() for t in tensors]
    flat, pieces = flat_copy(tensors, fellows)
    other, _ = flat_copy([t.clone().contiguous() for t in tensors], fellows)
    assert torch.equal(flat, other) and len(flat) == sum(t.numel() for t in tensors)
    for piece, tensor, fellow in zip(pieces, tensors, fellows):
        assert torch.equal(piece, tensor) and piece.stride() == torch.empty_like(fellow).stride()
    flat.zero_()
    assert not any(piece.any() for piece in pieces)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before))


def test_all_are_copied_by_one_operation():
    for layout in ("contiguous", "channels_last", "transposed"):
        tensors = layouts()[layout]
        with OperationCounts(torch.nn.Identity()) as counts:
            flat_copy(tensors, tensors)
        assert counts.operations == {"cat": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [0.0, 0.05, 7.0, 1e30])
def test_nothing_times_the_ratio_is_nothing(radius, dtype):
    zero = torch.zeros((), dtype=dtype)
    assert torch.equal(zero * safe_ratio(radius, zero), zero)
    assert torch.equal(safe_ratio(radius, torch.tensor(float("inf"), dtype=dtype)), zero)
    assert safe_ratio(radius, torch.tensor(float("nan"), dtype=dtype)).isnan()
    assert radius > 10 or safe_ratio(radius, torch.tensor(2.0, dtype=dtype)) == torch.tensor(radius, dtype=dtype) / 2
