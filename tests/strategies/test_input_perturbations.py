"""Perturbed images: pixels and their bounds, passes, batches and values that are refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf import METHODS, ApartError, create_loss, create_strategy
from tests.support.helpers import assert_same, batch, build, gradients, snapshot
from tests.support.oracle import PIXELS, SCALE

ADVPROP = {"steps": 2, **SCALE}


@pytest.mark.parametrize("steps, random_start, passes", [(1, False, 2), (1, True, 3), (5, False, 6), (5, True, 7)])
def test_the_model_runs_as_often_as_is_counted(steps, random_start, passes):
    model, data, calls = build("small"), batch(8, 8), []
    model.register_forward_hook(lambda *_: calls.append(1))
    strategy = create_strategy("advprop", model, steps=steps, random_start=random_start, **SCALE)
    strategy.accumulate_gradients(*data, cross_entropy)
    assert len(calls) == passes == strategy.passes == METHODS["advprop"].passes(steps=steps, random_start=random_start)
    assert METHODS["fast-advprop"].passes() == 1.25 and METHODS["advprop"].passes() == 6
    strategy.set(every=2, ratio=0.5)
    assert strategy.passes == 1 + 0.5 * (passes - 1) / 2


def test_pixels_stay_valid_and_within_the_radius():
    images = torch.tensor([0.0, 0.5, 1.0, 254.0, 255.0, 300.0, -20.0, 128.0]).view(8, 1, 1, 1).expand(8, 3, 8, 8) / 255
    mean, std = (torch.tensor(SCALE[key]).view(3, 1, 1) for key in ("mean", "std"))
    model, seen = build("small", dtype=torch.float32), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    strategy = create_strategy("advprop", model, pixel_epsilon=3, steps=6, random_start=True, **SCALE)
    strategy.accumulate_gradients((images - mean) / std, torch.arange(8) % 5, cross_entropy)
    pixels = [255 * (one * std + mean) for one in seen]
    for one in pixels[1:]:
        assert (one - 255 * images).abs().max() <= 3 + 1e-3
        assert one[:5].min() >= -1e-3 and one[:5].max() <= 255 + 1e-3
        assert one[5].max() <= 300 + 1e-3 and one[6].min() >= -20 - 1e-3  # may come nearer, and go no further out
    assert (pixels[-1] - 255 * images).abs()[7].max() > 2.9


def test_the_scale_is_the_model_s_own_where_none_is_given():
    data = batch(8, 16)
    found = []
    for scale in (
        {},
        {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        {"mean": [0.5], "std": np.array([0.5])},
        {"mean": 0.5, "std": torch.tensor(0.5)},
        {"mean": np.float64(0.5), "std": np.array(0.5)},
        {"mean": torch.tensor([0.5] * 3), "std": torch.tensor([0.5])},
        SCALE,
    ):
        model = build("test_resnet")  # whose pretrained_cfg says 0.5
        create_strategy("advprop", nn.Sequential(model), steps=2, **scale).accumulate_gradients(*data, cross_entropy)
        found.append(gradients(model))
    for other in found[1:-1]:
        assert_same(other, found[0], tolerance=0)
    with pytest.raises(AssertionError):
        assert_same(found[-1], found[0])


def test_images_of_a_batch():
    images, targets = batch(8, 12)
    masks = torch.rand(8, 1, 12, 12, dtype=torch.float64)
    results = []
    for part, take in [
        ((images, targets), lambda b: b[0]),
        ({"pixel_values": images, "labels": targets}, lambda b: b["pixel_values"]),
        ({"x": [images, images], "labels": targets}, lambda b: b["x"][1]),
        (((images, None), masks), lambda b: b[0][0]),
    ]:
        model = build("small")
        strategy = create_strategy("advprop", model, **ADVPROP)
        strategy.accumulate(part, lambda b, take=take, model=model: cross_entropy(model(take(b)), targets), samples=8)
        results.append(gradients(model))
    for other in results[1:]:
        assert_same(other, results[0], tolerance=0)


REFUSED = [
    ({"x": torch.zeros(8, 3, 4, 4), "masks": torch.zeros(8, 1, 4, 4)}, "2 floating-point tensors of 4 dimensions"),
    ({"x": torch.zeros(8, 3, 4, 4, dtype=torch.uint8)}, "no floating-point tensor of 4 dimensions"),
    ((torch.zeros(8, 12), torch.zeros(8)), "no floating-point tensor of 4 dimensions"),
    ((torch.zeros(8, 2, 4, 4), torch.zeros(8)), "have 2 channels, and .* has 3 values"),
]


@pytest.mark.parametrize("part, said", REFUSED)
def test_batches_that_are_refused(part, said):
    model = build("small")
    strategy = create_strategy("advprop", model, **ADVPROP)
    before = snapshot(model)
    with pytest.raises(ApartError, match=said):
        strategy.accumulate(part, lambda b: model(torch.randn(8, 3, 12, 12, dtype=torch.float64)).mean(), samples=8)
    assert snapshot(model) == before


def test_a_loss_that_does_not_look_at_the_batch_is_refused():
    model, data = build("small"), batch(8, 12)
    for hyper in ({"steps": 1}, {"steps": 1, "random_start": True}):
        strategy = create_strategy("advprop", model, **SCALE, **hyper)
        with pytest.raises(ApartError, match=r"does not (depend on the images|require grad)"):
            strategy.accumulate(data, lambda _: cross_entropy(model(data[0]), data[1]), samples=8)


@pytest.mark.parametrize(
    "hyper, said",
    [
        ({"pixel_epsilon": -1}, r"pixel_epsilon=-1: .*\[0, 255\]"),
        ({"pixel_epsilon": 256.0}, r"pixel_epsilon=256.0: .*\[0, 255\]"),
        ({"pixel_epsilon": float("nan")}, "pixel_epsilon=nan"),
        ({"pixel_epsilon": True}, "pixel_epsilon=True"),
        ({"pixel_step": 300}, "pixel_step=300"),
        ({"steps": 0}, "steps=0: .* >= 1"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"random_start": 1}, "random_start=1"),
        ({"mean": None}, "mean of the images' normalisation is not known"),
        ({"mean": None, "std": None}, "mean and std of the images' normalisation is not known: SmallNet"),
        ({"std": [0.5, 0.0, 0.5]}, "numbers above 0"),
        ({"mean": "0.5"}, "finite numbers are needed"),
        ({"mean": []}, "finite numbers are needed"),
        ({"mean": True}, "finite numbers are needed"),
        ({"mean": torch.tensor(True)}, "finite numbers are needed"),
        ({"mean": [0.5, np.True_, 0.5]}, "finite numbers are needed"),
        ({"mean": ["0.5"] * 3}, "finite numbers are needed"),
        ({"mean": b"123"}, "finite numbers are needed"),
        ({"mean": {0.4, 0.5, 0.6}}, "finite numbers are needed"),
        ({"std": {0.5: "green"}}, "finite numbers above 0 are needed"),
        ({"std": [10**400]}, "finite numbers above 0 are needed"),
        ({"mean": float("inf")}, "mean=inf: finite numbers are needed"),
        ({"std": 0}, "std=0: finite numbers above 0 are needed"),
        ({"std": torch.tensor(-1.0)}, "numbers above 0"),
    ],
    ids=str,
)
def test_bad_hyper_parameters_are_refused_in_one_line(hyper, said):
    with pytest.raises(ApartError, match=said) as caught:
        create_strategy("advprop", build("small"), **SCALE | hyper)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fails_in_pass", [1, 2, 3])
@pytest.mark.parametrize("method", PIXELS)
def test_nothing_is_left_on_the_model(method, fails_in_pass):
    model, data = build("test_byobnet"), batch(pixels=16)
    hyper = PIXELS[method] | SCALE | ({} if "apart" in method else {"aux_affine": True})
    strategy = create_strategy(method, model, **hyper)
    before, weights, calls = snapshot(model), copy.deepcopy(model.state_dict()), []

    def criterion(output, targets):
        calls.append(1)
        if len(calls) == fails_in_pass:
            raise RuntimeError("user's criterion")
        return cross_entropy(output, targets)

    if fails_in_pass == 3 and method == "fast-advprop":
        strategy.accumulate_gradients(*data, criterion)
    else:
        with pytest.raises(RuntimeError, match="user's criterion"):
            strategy.accumulate_gradients(*data, criterion)
    assert snapshot(model) == before and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, weights[n]) for n, value in model.named_parameters())
    assert all(p.requires_grad for p in strategy.parameters())


def test_a_scaler_and_the_loss_s_scale_change_nothing():
    """Signs are of unscaled gradients, overflows give none: float16 of the loss's own scale, and a GradScaler's."""
    results, data = [], batch(8, 12, dtype=torch.float32)
    for scale in (1.0, 2.0**10):
        model = build("small", dtype=torch.float32)
        strategy = create_strategy("advprop", model, aux_affine=True, **ADVPROP)
        strategy.accumulate_gradients(*data, cross_entropy, backward=lambda loss, s=scale: (loss * s).backward())
        found = {**gradients(model), **{f"aux {i}": p.grad for i, p in enumerate(strategy.parameters())}}
        results.append({name: g / scale for name, g in found.items()})
    assert_same(*results, tolerance=0)
    model = build("small", dtype=torch.float32)
    strategy, calls = create_strategy("advprop", model, **ADVPROP), []

    def overflowing(loss):
        calls.append(1)
        (loss * (float("inf") if len(calls) < 3 else 1.0)).backward()

    strategy.accumulate_gradients(*data, cross_entropy, backward=overflowing)
    assert strategy.figures()["pixel_delta"].isfinite()


def test_every_and_batches_of_another_size():
    """Plain steps between, and a last batch that the ratio does not fit: as for any method."""
    model, calls = build("small"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    strategy = create_strategy("fast-advprop", model, every=2, uneven="fit", aux_affine=True, **SCALE)
    sizes = []
    for step in range(4):
        before = len(calls)
        strategy.accumulate_gradients(*batch(6 if step == 3 else 8, 12), cross_entropy)
        sizes.append(len(calls) - before)
        assert (next(strategy.parameters()).grad is None) == (step == 0)
    assert sizes == [1, 2, 1, 2]
    with pytest.raises(ApartError, match=r"ratio=0.25 of a batch of 6"):
        create_strategy("fast-advprop", model, **SCALE).accumulate_gradients(*batch(6, 12), cross_entropy)


@pytest.mark.parametrize("as_loss", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(as_loss):
    data, grads = batch(8, 16), []
    for checkpointing in (False, True):
        model = build("test_resnet")
        model.set_grad_checkpointing(checkpointing)
        if as_loss:
            loss = create_loss("advprop", model, lambda m, b: cross_entropy(m(b[0]), b[1]), aux_affine=True, **ADVPROP)
            loss(data).backward()
            strategy = loss.strategy
        else:
            strategy = create_strategy("advprop", model, aux_affine=True, **ADVPROP)
            strategy.accumulate_gradients(*data, cross_entropy)
        grads.append(gradients(model) | {str(i): p.grad for i, p in enumerate(strategy.parameters())})
    assert_same(*grads)


def test_autocast_is_around_forwards_alone():
    model, (images, targets) = build("small", dtype=torch.float32), batch(8, 12, dtype=torch.float32)
    inside = []

    def backward(loss):
        inside.append(torch.is_autocast_enabled("cpu"))
        loss.backward()

    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    strategy = create_strategy("advprop", model, aux_affine=True, autocast=autocast, **ADVPROP)
    _, output = strategy.accumulate_gradients(images, targets, cross_entropy, backward=backward)
    assert inside == [False] * 3 and output.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in (*model.parameters(), *strategy.parameters()))
    assert strategy.figures()["pixel_delta"] > 0.5


@pytest.mark.skipif(torch.__version__ < (2, 14), reason="torch 2.6 compiles the passes anew at every call")
def test_compiled_models_keep_three_graphs():
    """Of the clean pass, of those that climb, and of the perturbed one."""
    model, graphs = build("small", dtype=torch.float32), []

    def backend(graph, _):
        graphs.append(1)
        return graph.forward

    torch._dynamo.reset()
    eager = copy.deepcopy(model)
    for network, makes in ((torch.compile(model, backend=backend, fullgraph=True), graphs), (eager, [])):
        strategy = create_strategy("advprop", network, aux_affine=True, steps=3, **SCALE)
        counts = []
        for _ in range(3):
            strategy.accumulate_gradients(*batch(8, 12, dtype=torch.float32), cross_entropy)
            counts.append(len(makes))
        assert counts in ([3, 3, 3], [0, 0, 0])
    assert_same(gradients(model), gradients(eager), tolerance=1e-4)
    torch._dynamo.reset()
