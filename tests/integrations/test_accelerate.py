"""accelerate's own loop with a loss of both passes: nothing of ours but the loss, whose state its checkpoints keep."""

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from apart_hf import ApartError, create_loss
from tests.support.helpers import assert_same, batch, build, forget_accelerator, snapshot
from tests.support.loops import CASES, by_strategy, hyper_of, sgd


def loss_fn(model, part):
    return cross_entropy(model(part[0]), part[1])


def images(rows, dtype):
    """In batches of 8, the last one as it comes."""
    x, y = batch(rows, 16, dtype=dtype)
    return torch.utils.data.DataLoader(list(zip(x, y.tolist())), batch_size=8)


def prepared(precision="no", accumulated=1, rows=40, dtype=torch.float32):
    forget_accelerator()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulated)
    model = build("small", dtype=dtype)
    return accelerator, *accelerator.prepare(model, sgd(model), images(rows, dtype))


def train(method, ratio, precision="no", accumulated=1, rows=40, dtype=torch.float32, loss_fn=loss_fn, **more):
    """The loop of the documentation; before each batch the global generator is seeded with its number."""
    accelerator, model, optimizer, loader = prepared(precision, accumulated, rows, dtype)
    before, losses = snapshot(model), []
    compute_loss = create_loss(method, model, loss_fn, **hyper_of(method, ratio), **more)
    try:
        for number, part in enumerate(loader):
            torch.manual_seed(number)
            with accelerator.accumulate(model):
                loss = compute_loss(part, ends_step=accelerator.sync_gradients)
                accelerator.backward(loss)
                losses.append(loss.item())
                optimizer.step()
                optimizer.zero_grad()
    finally:
        assert snapshot(model) == before
    return model.state_dict(), losses, compute_loss


def in_a_plain_loop(method, ratio, rows=40, dtype=torch.float32, **more):
    plain = build("small", dtype=dtype)
    own_loss = lambda part: loss_fn(plain, part)  # noqa: E731
    losses = by_strategy(plain, method, list(images(rows, dtype)), own_loss, **hyper_of(method, ratio), **more)
    return plain.state_dict(), losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("method, ratio", CASES)
def test_bit_equal_to_the_strategy_in_a_plain_loop(method, ratio, precision):
    """In bfloat16 accelerate keeps its autocast in the model's __dict__["forward"]."""
    state, losses, _ = train(method, ratio, precision)
    want, expected = in_a_plain_loop(method, ratio, bfloat16=precision == "bf16")
    assert losses == expected
    assert_same(state, want, tolerance=0)


@pytest.mark.parametrize("accumulated", [2, 3])
@pytest.mark.parametrize("method, ratio", CASES)
def test_accumulation_with_a_rest(method, ratio, accumulated):
    """Five batches in float64; accelerate divides by the same number in the last step, which has fewer."""
    options = {"dtype": torch.float64, "accumulated": accumulated}
    state, _, compute_loss = train(method, ratio, **options)
    want, _ = in_a_plain_loop(method, ratio, counted=accumulated, **options)
    assert_same(state, want, tolerance=1e-14)
    assert compute_loss.strategy.steps == -(-5 // accumulated)


@pytest.mark.parametrize("every", [2, 3])
def test_every_counts_steps_of_the_optimizer(every):
    options = {"dtype": torch.float64, "accumulated": 2, "every": every}
    state, _, _ = train("apart-sam", 0.5, **options)
    want, _ = in_a_plain_loop("apart-sam", 0.5, counted=2, **options)
    assert_same(state, want, tolerance=1e-14)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("fails_in_call", [3, 4])
def test_an_exception_in_either_pass_leaves_nothing_on_the_model(fails_in_call, precision):
    """That of the second batch; `train` compares the model with what it was."""
    calls = []

    def failing(model, part):
        calls.append(1)
        if len(calls) == fails_in_call:
            raise RuntimeError("of the user")
        return loss_fn(model, part)

    with pytest.raises(RuntimeError, match="of the user"):
        train("apart-sam", 1, precision, loss_fn=failing)
    assert len(calls) == fails_in_call


@pytest.mark.parametrize("ratio", [1, 0.5])
@pytest.mark.parametrize("last", [1, 7, 3])
def test_last_batches_of_any_size(last, ratio, caplog):
    """accelerate drops none: one image, a prime number, fewer than groups."""
    sizes, options = {"rows": 16 + last}, {"groups": 4, "uneven": "fit"}
    plain = build("small", dtype=torch.float32)
    own_loss = lambda part: loss_fn(plain, part)  # noqa: E731
    parts = list(images(**sizes, dtype=torch.float32))
    assert [len(part[1]) for part in parts] == [8, 8, last]
    accelerator, model, optimizer, loader = prepared(**sizes)
    compute_loss = create_loss("apart", model, loss_fn, ratio=ratio, **options)
    losses = []
    for number, part in enumerate(loader):
        torch.manual_seed(number)
        loss = compute_loss(part)
        accelerator.backward(loss)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert caplog.text.count("Further batches that do not fit") == 1
    assert losses == by_strategy(plain, "apart", parts, own_loss, ratio=ratio, **options)
    assert_same(model.state_dict(), plain.state_dict(), tolerance=0)
    refused = create_loss("apart", model, loss_fn, ratio=ratio, groups=4)
    with pytest.raises(ApartError, match=rf"groups=4 does not divide|ratio=0\.5 of a batch of {last}"):
        refused(parts[-1])


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
