"""Perturbed images and auxiliary BN: the oracle in float64, pixels and their bounds, what is refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf import METHODS, ApartError, Method, create_loss, create_strategy
from apart_hf.strategies.input_perturbations import Inputs
from apart_hf.strategies.weight_perturbations import Weights
from tests.reference import reference_images_step
from tests.support.helpers import Tokens, assert_same, batch, build, gradients, snapshot
from tests.support.oracle import PIXELS, SCALE, check_images

ADVPROP = {"steps": 2, **SCALE}


def made(name, **more):
    torch.manual_seed(0)
    return Tokens().double().train() if name == "tokens" else build(name, **more)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet", "bn1d", "tokens"])
@pytest.mark.parametrize("method", PIXELS)
def test_agrees_with_the_oracle(method, name, channels_last):
    model, (images, targets) = made(name), batch(pixels=16)
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
    check_images(made(name), *batch(pixels=16), "advprop", hyper)


@pytest.mark.parametrize("method", ["advprop", "fast-advprop"])
@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "bn1d", "tokens"])
def test_gamma_and_beta_of_their_own(name, method):
    """Two steps, and the auxiliary gamma and beta have left the model's before: the second one tells them apart."""
    model, data = made(name), batch(pixels=16)
    hyper = PIXELS[method] | {"aux_affine": True}
    strategy = check_images(model, *data, method, hyper)
    with torch.no_grad():
        for p in strategy.parameters():
            p.add_(torch.linspace(-0.2, 0.3, p.numel(), dtype=p.dtype))
    held, model.grad = strategy.state_dict()["auxiliary"], None
    for p in (*model.parameters(), *strategy.parameters()):
        p.grad = None
    other = torch.Generator()
    other.set_state(strategy.generator.get_state())
    want, buffers, own, after = reference_images_step(
        model, *data, cross_entropy, method, auxiliary=held, generator=other, **SCALE, **hyper
    )
    strategy.accumulate_gradients(*data, cross_entropy)
    assert_same(gradients(model), want)
    (auxiliary,) = strategy.perturbations[1:]
    assert own and len(own) == len(list(strategy.parameters()))
    assert_same({n: p.grad for n, p in auxiliary.named_parameters()}, own)
    assert_same({n: t.double() for n, t in auxiliary.state_dict().items()}, {n: t.double() for n, t in after.items()})
    assert_same({n: b.double() for n, b in model.named_buffers()}, {n: b.double() for n, b in buffers.items()})


@pytest.mark.parametrize("method", ["advprop", "fast-advprop"])
def test_the_loss_of_another_loop_has_the_same_gradients(method):
    model, data = made("test_byobnet"), batch(pixels=16)
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
    check_images(made("test_byobnet"), images, soft, method, PIXELS[method])


@pytest.mark.parametrize("aux_affine", [False, True])
def test_frozen_gamma_and_layers(aux_affine):
    model = made("test_resnet")
    for i, layer in enumerate(m for m in model.modules() if isinstance(m, _BatchNorm)):
        layer.weight.requires_grad_(i % 3 != 0)
        layer.train(i % 4 != 1)
    strategy = create_strategy("advprop", model, aux_affine=aux_affine, **ADVPROP)
    layers = strategy.perturbations[1].layers
    asleep = {n for n, layer in layers.items() if not layer.training}
    before = strategy.state_dict()["auxiliary"]
    data = batch(pixels=16)
    want, buffers, own, _ = reference_images_step(
        model, *data, cross_entropy, "advprop", steps=2, aux_affine=aux_affine, **SCALE
    )
    strategy.accumulate_gradients(*data, cross_entropy)
    assert asleep
    # a frozen layer is the model's own in all passes
    shared = {n: (want[n] + own[n] if n in own and n.rpartition(".")[0] in asleep else want[n]) for n in want}
    assert_same(gradients(model), shared)
    assert_same({n: b.double() for n, b in model.named_buffers()}, {n: b.double() for n, b in buffers.items()})
    for name, value in strategy.state_dict()["auxiliary"].items():
        layer, _, kind = name.rpartition(".")
        assert torch.equal(value, before[name]) == (layer in asleep or kind in ("weight", "bias"))


def test_balanced_updates_where_layers_are_frozen():
    """Both passes reach the gamma and beta of a layer in eval mode, so that they are balanced as all others."""
    model, data = made("test_resnet"), batch(pixels=16)
    asleep = set()
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)][::2]:
        layer.eval()
        asleep |= {f"{name}.weight", f"{name}.bias"}
    hyper = {**PIXELS["fast-advprop"], **SCALE}
    wanted = [
        reference_images_step(
            model,
            *data,
            cross_entropy,
            "fast-advprop",
            **hyper | {"aux_affine": aux_affine},
            generator=torch.Generator().manual_seed(1),
        )[0]
        for aux_affine in (False, True)
    ]
    strategy = create_strategy(
        "fast-advprop", model, **hyper | {"aux_affine": True}, generator=torch.Generator().manual_seed(1)
    )
    strategy.accumulate_gradients(*data, cross_entropy)
    assert_same(gradients(model), {n: wanted[n not in asleep][n] for n in wanted[0]})


@pytest.mark.parametrize("method", ["advprop", "fast-advprop"])
def test_models_without_batchnorm(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)).double()
    strategy = check_images(model, *batch(8, 4), method, PIXELS[method])
    assert strategy.state_dict()["auxiliary"] == {}


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


@pytest.mark.parametrize("steps, random_start, passes", [(1, False, 2), (1, True, 3), (5, False, 6), (5, True, 7)])
def test_the_model_runs_as_often_as_is_counted(steps, random_start, passes):
    model, data, calls = made("small"), batch(8, 8), []
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


def test_deltas_follow_their_samples():
    """Half of the batch, in the order that channels_last computes fastest in: each image differs by its own delta."""
    images, targets = batch(16, 16)
    model = made("test_resnet").to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    check_images(model, images, targets, "apart-advprop", {"groups": 2, "ratio": 0.5, "steps": 3})


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
        model = made("small")
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
    model = made("small")
    strategy = create_strategy("advprop", model, **ADVPROP)
    before = snapshot(model)
    with pytest.raises(ApartError, match=said):
        strategy.accumulate(part, lambda b: model(torch.randn(8, 3, 12, 12, dtype=torch.float64)).mean(), samples=8)
    assert snapshot(model) == before


def test_a_loss_that_does_not_look_at_the_batch_is_refused():
    model, data = made("small"), batch(8, 12)
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
        ({"mean": float("inf")}, "mean=inf: finite numbers are needed"),
        ({"std": 0}, "std=0: finite numbers above 0 are needed"),
        ({"std": torch.tensor(-1.0)}, "numbers above 0"),
    ],
    ids=str,
)
def test_bad_hyper_parameters_are_refused_in_one_line(hyper, said):
    with pytest.raises(ApartError, match=said) as caught:
        create_strategy("advprop", made("small"), **SCALE | hyper)
    assert "\n" not in str(caught.value)


def test_aux_affine_needs_a_batchnorm_and_is_decided_once():
    without = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    with pytest.raises(ApartError, match=r"aux_affine=True: Sequential has no BatchNorm layer"):
        create_strategy("advprop", without, aux_affine=True, **SCALE)
    model = made("small")
    strategy = create_strategy("advprop", model, **ADVPROP)
    with pytest.raises(ApartError, match="aux_affine=True: it is decided as the strategy is made"):
        strategy.set(aux_affine=True)
    assert not strategy.hyper["aux_affine"] and not list(strategy.parameters())
    other = create_strategy("advprop", model, aux_affine=True, **ADVPROP)
    with pytest.raises(ApartError, match="aux_affine"):
        strategy.load_state_dict(other.state_dict())
    strategy.set(pixel_epsilon=2, steps=1)
    assert strategy.perturbations[0].pixel_epsilon == 2 and strategy.passes == 2


@pytest.mark.parametrize("fails_in_pass", [1, 2, 3])
@pytest.mark.parametrize("method", PIXELS)
def test_nothing_is_left_on_the_model(method, fails_in_pass):
    model, data = made("test_byobnet"), batch(pixels=16)
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


def test_state_goes_on_where_it_was():
    """Statistics, gamma and beta of auxiliary BN are in the state, the generator as well: the next step is the same."""
    data = batch(8, 12)

    def make(model):
        generator = torch.Generator().manual_seed(3)
        hyper = {"random_start": True, "ratio": 0.5, "aux_affine": True, "generator": generator}
        return create_strategy("advprop", model, **ADVPROP | hyper)

    def step(model, strategy):
        optimizer = torch.optim.SGD([*model.parameters(), *strategy.parameters()], lr=0.1)
        strategy.accumulate_gradients(*data, cross_entropy)
        optimizer.step()

    model = made("small")
    first = make(model)
    step(model, first)
    model.zero_grad()
    other = copy.deepcopy(model)
    second = make(other)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p in first.parameters():
        p.grad = None
    for one, strategy in ((model, first), (other, second)):
        step(one, strategy)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    a, b = (strategy.state_dict()["auxiliary"] for strategy in (first, second))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["bn1.weight"], model.bn1.weight)
    with pytest.raises(ApartError, match="auxiliary BatchNorm is of another model"):
        make(build("test_resnet")).load_state_dict(first.state_dict())


def test_every_and_batches_of_another_size():
    """Plain steps between, and a last batch that the ratio does not fit: as for any method."""
    model, calls = made("small"), []
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
        model = made("test_resnet")
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


def test_weights_and_images_at_once(monkeypatch):
    """A line of the table: the images climb, in steps, on the network whose weights SAM has moved."""
    monkeypatch.setitem(METHODS, "sam-images", Method("", (Weights, Inputs), keeps_clean_gradient=False))
    model, (images, targets) = made("small"), batch(8, 12)
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


def test_layers_that_share_gamma_share_the_auxiliary_one():
    model = made("small")
    model.bn2.weight = model.bn1.weight
    strategy = create_strategy("advprop", model, aux_affine=True, **ADVPROP)
    assert len(list(strategy.parameters())) == 3 == len({id(p) for p in strategy.parameters()})
    strategy.accumulate_gradients(*batch(8, 12), cross_entropy)
    assert all(p.grad.any() for p in strategy.parameters())


def test_a_halved_ordinary_pass_is_one_also_for_balanced_updates(monkeypatch):
    """What other processes await: a batch that does not fit takes an ordinary pass in two halves."""
    monkeypatch.setattr("apart_hf.strategies.algorithm.processes", lambda: 2)
    model, (images, targets) = made("small"), batch(6, 12)
    plain = copy.deepcopy(model)
    cross_entropy(plain(images), targets).backward()
    strategy = create_strategy("fast-advprop", model, uneven="plain", aux_affine=True, **SCALE)
    strategy.accumulate_gradients(images, targets, cross_entropy)
    assert_same(gradients(model), gradients(plain))
