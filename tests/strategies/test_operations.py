"""How many operations a step dispatches: each is a launch on a device. Numbers are exact, of any size of images."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from apart_hf import create_strategy
from apart_hf.batchnorm import patching, use_kernels
from apart_hf.batchnorm.affine import affine_of_all
from apart_hf.utils.operation_counts import count_operations
from tests.reference import reference_step
from tests.support.helpers import assert_same, batch, build, gradients

KEPT, NONE = True, False


def operations(method, channels_last, dtype, gradients_are_kept, **hyper):
    model = timm.create_model("wide_resnet40_2", num_classes=10)
    images, targets = torch.randn(32, 3, 8, 8), torch.arange(32) % 10
    if channels_last:
        model, images = (t.to(memory_format=torch.channels_last) for t in (model, images))
    autocast = None if dtype == torch.float32 else lambda: torch.autocast("cpu", dtype)
    strategy = create_strategy(method, model, autocast=autocast, **hyper)

    def step():
        strategy.accumulate_gradients(images, targets, cross_entropy)

    step()
    model.zero_grad(set_to_none=not gradients_are_kept)
    return count_operations(model, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "channels_last, groups, most", [(False, 1, 2.6), (False, 16, 2.6), (True, 1, 2.6), (True, 16, 3.5)]
)
def test_a_step_of_the_device_s_kernels(channels_last, groups, most, dtype):
    with use_kernels("device"):
        plain = operations("standard", channels_last, dtype, KEPT)
        apart = operations("apart", channels_last, dtype, KEPT, groups=groups)
    assert apart.operations.total() <= most * plain.operations.total()
    # two passes, and none for the groups but that of the images, which are put in their order
    assert (apart.copies - plain.copies - plain.copies).total() == (channels_last and groups > 1)


@pytest.mark.parametrize("groups", [1, 16])
def test_a_step_whose_gradients_are_new(groups):
    """Both passes then make them once, and the second adds, which a plain step does not."""
    with use_kernels("device"):
        plain = operations("standard", False, torch.float32, NONE).operations.total()
        apart = operations("apart", False, torch.float32, NONE, groups=groups).operations.total()
    assert apart <= 2.6 * plain


@pytest.mark.parametrize("kept", [KEPT, NONE])
@pytest.mark.parametrize("method", ["sam", "asam", "sam-on", "gsam", "awp"])
def test_a_step_in_the_weights(method, kept):
    """Two passes, and a few operations for all parameters at once, whether gradients were there before or not."""
    plain = operations("standard", False, torch.float32, kept).operations
    moved = operations(method, False, torch.float32, kept).operations
    assert moved.total() <= 2.1 * plain.total()
    assert sum(count for name, count in moved.items() if name.startswith("_foreach")) <= 14


def test_layers_share_what_is_per_channel():
    """Ten more layers cost ten times their kernels, and nothing else."""

    def cost(depth):
        model, images = nn.Sequential(*[nn.BatchNorm1d(4) for _ in range(depth)]), torch.randn(8, 4)
        strategy = create_strategy("apart", model, groups=2)

        def step():
            strategy.accumulate_gradients(images, images, nn.functional.mse_loss)

        step()
        return count_operations(model, step).operations.total()

    with use_kernels("device"):
        costs = [cost(depth) for depth in (1, 11, 21)]
    per_layer = (costs[2] - costs[1]) / 10
    assert (costs[1] - costs[0]) / 10 == per_layer
    # two forwards and backwards, and two gradients to add to twice; mu/sigma and its gradient in both passes, the shift
    assert per_layer == 4 + 4 + 5


def test_there_is_no_other_set():
    with pytest.raises(ValueError, match="no set of kernels 'gpu'; choose from auto, cpu, rows, device"):
        use_kernels("gpu")


def test_a_set_is_forced_until_it_is_not():
    def total():
        return operations("apart", True, torch.float32, NONE, groups=16).operations.total()

    cpu = total()
    with use_kernels("device"):
        device = total()
    assert device < cpu == total()
    use_kernels("device")
    try:
        assert total() == device
    finally:
        use_kernels("auto")
    assert total() == cpu


@pytest.mark.parametrize("compiled, times", [("nothing", 2), ("a layer", 2), ("all", 0)])
def test_what_is_per_channel_is_computed_for_layers_that_are_not_compiled(compiled, times, monkeypatch):
    """Once in each pass for all of them; a compiler fuses it with the rest of a layer."""
    made = []
    monkeypatch.setattr(patching, "affine_of_all", lambda *args, **more: made.append(1) or affine_of_all(*args, **more))
    model = build("small")
    want, _, _ = reference_step(model, *batch(8, 8), cross_entropy, "apart", groups=2, epsilon=0.1)
    if compiled == "a layer":
        model.bn1.compile(backend="eager")
    network = torch.compile(model, backend="eager") if compiled == "all" else model
    strategy = create_strategy("apart", network, groups=2)
    strategy.accumulate_gradients(*batch(8, 8), cross_entropy)
    torch._dynamo.reset()
    assert_same(gradients(model), want)
    assert len(made) == times


def test_it_is_differentiable_where_the_first_layer_runs_without_gradients():
    """As within reentrant checkpointing, which runs it again with them."""
    model = build("small")
    want, _, _ = reference_step(model, *batch(8, 8), cross_entropy, "apart", groups=2, epsilon=0.1)

    def loss_fn(part):
        images = part[0].clone().requires_grad_()
        return cross_entropy(checkpoint(model, images, use_reentrant=True), part[1])

    strategy = create_strategy("apart", model, groups=2)
    strategy.accumulate(batch(8, 8), loss_fn)
    assert_same(gradients(model), want)
