"""Perturbed images against the oracle in float64: gradients, buffers and pixels."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from apart_hf import METHODS, Method, create_loss, create_strategy
from apart_hf.strategies.input_perturbations import Inputs
from apart_hf.strategies.weight_perturbations import Weights
from tests.reference import reference_images_step
from tests.support.helpers import assert_same, batch, build, gradients
from tests.support.oracle import PIXELS, SCALE, check_images


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet", "bn1d", "tokens"])
@pytest.mark.parametrize("method", PIXELS)
def test_agrees_with_the_oracle(method, name, channels_last):
    model, (images, targets) = build(name), batch(pixels=16)
    if channels_last:
        model, images = (t.to(memory_format=torch.channels_last) for t in (model, images))
    strategy = check_images(model, images, targets, method, PIXELS[method])
    assert 0.1 < strategy.figures()["pixel_delta"] <= PIXELS[method].get("pixel_epsilon", 4.0)


@pytest.mark.parametrize(
    "hyper",
    [
        {"steps": 1},
        {"steps": 1, "random_start": True},
        {"steps": 3, "random_start": True, "pixel_epsilon": 2.5, "pixel_step": 1.75},
        {"steps": 4, "pixel_epsilon": 0.75, "pixel_step": 0.5, "ratio": 0.5},
        {"steps": 2, "random_start": True, "ratio": 0.75, "aux_affine": True},
        {"pixel_epsilon": 255.0, "pixel_step": 255.0, "steps": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["test_byobnet", "tokens"])
def test_every_hyper_parameter(name, hyper):
    check_images(build(name), *batch(pixels=16), "advprop", hyper)


@pytest.mark.parametrize("method", ["advprop", "fast-advprop"])
def test_the_loss_of_another_loop_has_the_same_gradients(method):
    model, data = build("test_byobnet"), batch(pixels=16)
    hyper = PIXELS[method] | {"aux_affine": True}
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    want, _, own, _ = reference_images_step(
        model, *data, cross_entropy, method, generator=generators[0], **SCALE, **hyper
    )
    compute_loss = create_loss(
        method,
        model,
        lambda model, part: cross_entropy(model(part["x"]), part["y"]),
        generator=generators[1],
        **SCALE,
        **hyper,
    )
    (0.5 * compute_loss({"x": data[0], "y": data[1]})).backward()
    assert_same({n: 2 * g for n, g in gradients(model).items()}, want)
    found = dict(compute_loss.strategy.perturbations[1].named_parameters())
    assert_same({n: 2 * p.grad for n, p in found.items()}, own)


@pytest.mark.parametrize("method", PIXELS)
def test_soft_labels(method):
    images, targets = batch(pixels=16)
    soft = 0.3 * one_hot(targets, 5).double() + 0.7 * one_hot(targets, 5).double().flip(0)
    check_images(build("test_byobnet"), images, soft, method, PIXELS[method])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", PIXELS)
def test_buffers_are_those_of_a_plain_step_bit_for_bit(method, dtype):
    model, (images, targets) = build("test_efficientnet", dtype=dtype), batch(16, 16, dtype=dtype)
    plain = copy.deepcopy(model)
    cross_entropy(plain(images), targets).backward()
    kept = images.clone()
    _, output = create_strategy(method, model, **SCALE, **PIXELS[method]).accumulate_gradients(
        images, targets, cross_entropy
    )
    for (key, want), (_, got) in zip(plain.named_buffers(), model.named_buffers()):
        assert torch.equal(want, got), key
    assert torch.equal(images, kept) and not output.requires_grad


def test_deltas_follow_their_samples():
    """Half of the batch, in the order that channels_last computes fastest in: each image differs by its own delta."""
    images, targets = batch(16, 16)
    model = build("test_resnet").to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    check_images(model, images, targets, "apart-advprop", {"groups": 2, "ratio": 0.5, "steps": 3})


def test_weights_and_images_at_once(monkeypatch):
    """A line of the table: the images climb, in steps, on the network whose weights SAM has moved."""
    monkeypatch.setitem(METHODS, "sam-images", Method("", (Weights, Inputs), keeps_clean_gradient=False))
    model, (images, targets) = build("small"), batch(8, 12)
    network = copy.deepcopy(model)
    phi = list(network.parameters())
    mean, std = (torch.tensor(SCALE[key], dtype=torch.float64).view(3, 1, 1) for key in ("mean", "std"))
    unit = 1 / (255 * std)
    x = images.clone().requires_grad_()
    *g, g_x = torch.autograd.grad(cross_entropy(network(x), targets), [*phi, x])
    norm = torch.sqrt(sum(part.square().sum() for part in g))
    with torch.no_grad():
        for p, part in zip(phi, g):
            p.add_(0.1 * part / norm)
    black, white = (0 - mean) / std, (1 - mean) / std
    bounds = (black - images).clamp(max=0), (white - images).clamp(min=0)
    d = (unit * g_x.sign()).clamp(*bounds)
    for _ in range(2):
        at = (images + d).requires_grad_()
        (g_x,) = torch.autograd.grad(cross_entropy(network(at), targets), at)
        d = (d + unit * g_x.sign()).clamp(*bounds)
    want = torch.autograd.grad(cross_entropy(network(images + d), targets), phi)
    strategy = create_strategy("sam-images", model, rho=0.1, steps=3, pixel_epsilon=255, **SCALE)
    strategy.accumulate_gradients(images, targets, cross_entropy)
    assert_same(gradients(model), dict(zip((n for n, _ in model.named_parameters()), want)))
    assert strategy.passes == 4
