"""Where a device works through what is launched, a training step asks it for no number, since that means to wait."""

import pytest
import torch
from timm.utils import ModelEmaV3

from apart_hf.batchnorm import use_kernels
from apart_hf.training.nonfinite import NonFinite
from tests.support.helpers import build
from tests.support.no_wait import NoWait
from tests.support.trainers import batches, trainer


@pytest.fixture(autouse=True)
def a_device():
    with use_kernels("device"):
        yield


@pytest.mark.parametrize(
    "method, accumulated, layout",
    [
        ("standard", 1, "contiguous_format"),
        ("apart", 1, "contiguous_format"),
        ("apart", 2, "channels_last"),
        ("apart-sam", 1, "contiguous_format"),
        ("asam", 2, "contiguous_format"),
        ("random-bn", 1, "contiguous_format"),
        ("ghost-bn", 1, "channels_last"),
    ],
)
def test_steps_wait_for_nothing(method, accumulated, layout):
    model = build("test_resnet", dtype=torch.float32).to(memory_format=getattr(torch, layout))
    data = [(images.float(), labels) for images, labels in batches(20 * accumulated)]
    more = {"clip_grad": 1.0, "ema": ModelEmaV3(model), "log_interval": 50}
    hyper = {"ratio": 0.5, "groups": 2} if method in ("apart", "apart-sam", "random-bn") else None
    one = trainer(model, data, method, accumulated, hyper=hyper, **more)
    one.model.train()
    for images, labels in data:
        with NoWait():
            loss, output = one.train_step(images, labels)
            one.progress.count(loss, output, labels)
    assert one.progress.steps == 20


def test_the_mode_sees_what_waits():
    with NoWait(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        bool(torch.ones(()))
    with NoWait(), pytest.raises(AssertionError, match="tolist"):
        torch.ones(3).tolist()


@pytest.mark.parametrize("interval, seen", [(4, "seen at step 8"), (50, "seen when the step was over")])
def test_a_bad_step_ends_the_run_where_the_verdict_is_read(interval, seen):
    one = trainer(build("test_byobnet"), batches(10, bad=[5, 6]), log_interval=interval)
    with pytest.raises(NonFinite, match=f"^step 6: its loss, .* was {seen}, at learning rate 0.01; --log-interval 1"):
        one.train_epoch("test")
    with pytest.raises(NonFinite):  # so that no checkpoint is written
        one.state()


@pytest.mark.parametrize("interval", [1, 3, 6])
def test_a_step_at_which_it_is_read_is_not_made(interval):
    """It is as on the CPU then: the cause is known, and weights are those of the step before."""
    data = batches(6, bad=[5])
    one = trainer(build("test_byobnet"), data, log_interval=interval)
    with pytest.raises(NonFinite, match=r"^step 6: .* the first non-finite values are in the images"):
        one.train_epoch("test")
    with use_kernels("auto"):
        other = trainer(build("test_byobnet"), data[:5])
    with use_kernels("device"):
        other.train_epoch("test")
    assert one.progress.steps == 5
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters()))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_skipping_is_that_of_the_cpu(accumulated):
    states = []
    for kernels in ("auto", "device"):
        with use_kernels(kernels):
            one = trainer(
                build("test_byobnet"),
                batches(6, bad=[2]),
                "standard",
                accumulated,
                skip_nonfinite=True,
                log_interval=50,
            )
        with use_kernels("device"):  # of one set, so that numbers are the same
            one.train_epoch("test")
        assert one.guard.skipped == 1
        states.append(one.model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
