"""accelerate's own loop with a loss of both passes: nothing of ours but the loss, whose state its checkpoints keep."""

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from apart_hf import create_loss, create_strategy
from tests.support.helpers import assert_same, batch, build, forget_accelerator, snapshot

HYPER = {"standard": {}, "apart": {"groups": 2, "ratio": 0.5}, "sam": {"rho": 0.1}, "apart-sam": {"groups": 2}}


def loss_fn(model, part):
    return cross_entropy(model(part[0]), part[1])


def prepared(precision="no", accumulated=1, rows=40, dtype=torch.float32):
    forget_accelerator()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulated)
    model, (x, y) = build("small", dtype=dtype), batch(rows, 16, dtype=dtype)
    loader = torch.utils.data.DataLoader(list(zip(x, y.tolist())), batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


def train(way, method, precision, accumulated=1, dtype=torch.float32):
    accelerator, model, optimizer, loader = prepared(precision, accumulated, dtype=dtype)
    before, options = snapshot(model), {"generator": torch.Generator().manual_seed(3)} | HYPER[method]
    compute_loss = create_loss(method, model, loss_fn, **options)
    strategy = create_strategy(method, model, accelerator=accelerator, **options)
    for part in loader:
        with accelerator.accumulate(model):
            if way == "loss":
                accelerator.backward(compute_loss(part))
            else:
                strategy.accumulate_gradients(*part, cross_entropy)
            optimizer.step()
            optimizer.zero_grad()
    assert snapshot(model) == before
    return model.state_dict()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("method", HYPER)
def test_bit_equal_to_the_strategy(method, precision):
    """In bfloat16 accelerate keeps its autocast in the model's __dict__["forward"]."""
    assert_same(train("loss", method, precision), train("strategy", method, precision), tolerance=0)


@pytest.mark.parametrize("method", HYPER)
def test_accumulation_with_a_rest(method):
    found = [train(way, method, "no", accumulated=2, dtype=torch.float64) for way in ("loss", "strategy")]
    assert_same(*found, tolerance=1e-13)


def test_accelerate_s_checkpoints_keep_the_state(tmp_path):
    found = []
    for resumes in (False, True):
        accelerator, model, optimizer, loader = prepared()
        options = {"groups": 2, "ratio": 0.5, "every": 2}
        compute_loss = create_loss(
            "apart", model, loss_fn, generator=torch.Generator().manual_seed(int(resumes)), **options
        )
        accelerator.register_for_checkpointing(compute_loss)
        if resumes:
            accelerator.load_state(str(tmp_path / "at 3"))
            assert compute_loss.strategy.steps == 3
        for number, part in enumerate(loader):
            if resumes and number < 3:
                continue
            if number == 3 and not resumes:
                accelerator.save_state(str(tmp_path / "at 3"))
            accelerator.backward(compute_loss(part))
            optimizer.step()
            optimizer.zero_grad()
        found.append(model.state_dict())
    assert_same(*found, tolerance=0)
