"""advbn against the oracle in float64, its layer by name, and what it leaves behind."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf import METHODS, ApartError, create_loss, create_strategy
from tests.reference import reference_advbn_step
from tests.support.helpers import assert_same, batch, build, gradients, snapshot

CASES = [  # model, layer, what "auto" is there, dimension of the channels
    ("resnet18", "auto", "layer1", 1),
    ("test_resnet", "layer2.0", None, 1),
    ("test_efficientnet", "auto", "blocks.1", 1),  # BatchNormAct2d, and features of both signs
    ("test_efficientnet", "bn1", None, 1),
    ("test_byobnet", "auto", "stages.0", 1),
    ("wide_resnet16_2", "auto", "layer1", 1),
    ("bn1d", "bn1", None, 1),
    ("bn1d", "shared", None, 1),  # called twice in a pass
    ("levit_128s", "auto", "stages.0", 2),  # tokens
]


@pytest.mark.parametrize(
    "name, layer, auto, channels, way",
    [(*case, way) for way in ("accumulate", "create_loss") for case in (CASES if way == "accumulate" else CASES[4:8])],
)
def test_agrees_with_the_oracle(name, layer, auto, channels, way):
    options = {"img_size": 64} if name.startswith("levit") else {}
    model, data = build(name, **options), batch(8, 16 if name.startswith("wide") else 64 if options else 32)
    hyper = {"epsilon": 0.5, "step_size": 0.3, "steps": 2 if name in ("resnet18", "levit_128s") else 3, "ratio": 0.5}
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    want, buffers, deltas = reference_advbn_step(
        model, *data, cross_entropy, auto or layer, channels=channels, generator=generators[0], **hyper
    )
    if way == "accumulate":
        strategy = create_strategy("advbn", model, layer=layer, generator=generators[1], **hyper)
        strategy.accumulate_gradients(*data, cross_entropy)
    else:
        loss_fn = lambda model, part: cross_entropy(model(part[0]), part[1])  # noqa: E731
        loss = create_loss("advbn", model, loss_fn, layer=layer, generator=generators[1], **hyper)
        loss(data).backward()
        strategy = loss.strategy
    assert strategy.perturbations[0].name == (auto or layer)
    assert_same(gradients(model), want)
    assert_same({n: b.double() for n, b in model.named_buffers()}, {n: b.double() for n, b in buffers.items()})
    assert_same(dict(enumerate(strategy.perturbations[0]._leaves)), dict(enumerate(deltas)))
    assert torch.cat(deltas).abs().max() == 0.5 or len(deltas[0]) < 4  # the projection had a part


@pytest.mark.parametrize("name, layer", [("test_resnet", "layer1"), ("test_byobnet", "stages.0")])
def test_checkpointed_activations_are_perturbed(name, layer):
    model, data = build(name), batch(8)
    want, _, _ = reference_advbn_step(model, *data, cross_entropy, layer, steps=2)
    model.set_grad_checkpointing()
    create_strategy("advbn", model, steps=2).accumulate_gradients(*data, cross_entropy)
    assert_same(gradients(model), want)


class Innermost(nn.Module):
    """Features with the channels innermost, as in Swin."""

    output_fmt = "NHWC"

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 2, 2), nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)).square())


@pytest.mark.parametrize("layer, channels", [("norm", 3), ("conv", 1)])
def test_channels_may_be_innermost(layer, channels):
    torch.manual_seed(0)
    model, data = Innermost().double(), batch(8, 8)
    want, _, deltas = reference_advbn_step(model, *data, cross_entropy, layer, steps=2, channels=channels)
    strategy = create_strategy("advbn", model, layer=layer, steps=2)
    strategy.accumulate_gradients(*data, cross_entropy)
    assert [len(delta) for delta in deltas] == [6, 6]
    assert_same(gradients(model), want)


def test_feature_info_may_name_what_is_not_there(model):
    model.feature_info = [{"module": "block.0", "reduction": 4, "num_chs": 8}]
    with pytest.raises(ApartError, match=r"layer='auto': .* has no feature_info that tells its first stage"):
        create_strategy("advbn", model)


def test_frozen_weights_before_the_layer():
    """Fine-tuning as the authors do: what lies before the layer is neither trained nor in train mode."""
    model, data = build("test_resnet"), batch(8)
    for part in (model.conv1, model.bn1, model.layer1):
        part.requires_grad_(False).eval()
    want, buffers, _ = reference_advbn_step(model, *data, cross_entropy, "layer1", steps=2)
    create_strategy("advbn", model, steps=2).accumulate_gradients(*data, cross_entropy)
    assert_same(gradients(model), want)
    assert_same({n: b.double() for n, b in model.named_buffers()}, {n: b.double() for n, b in buffers.items()})
    assert all(p.grad is None for p in model.layer1.parameters())


def test_without_a_clean_gradient_the_attack_is_the_same():
    model, data = build("test_byobnet"), batch(8)
    _, _, deltas = reference_advbn_step(model, *data, cross_entropy, "stages.0", steps=1)
    strategy = create_strategy(["advbn"], model, keeps_clean_gradient=False, steps=1)
    strategy.accumulate_gradients(*data, cross_entropy)
    assert_same(dict(enumerate(strategy.perturbations[0]._leaves)), dict(enumerate(deltas)))


def test_the_clean_pass_is_the_plain_one_bit_for_bit(model, data):
    plain = copy.deepcopy(model)
    want = plain(data[0])
    before, calls = snapshot(model), []
    strategy = create_strategy("advbn", model, steps=3)
    model.register_forward_hook(lambda *_: calls.append(1))
    _, output = strategy.accumulate_gradients(*data, cross_entropy)
    assert torch.equal(output, want)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers()))
    assert len(calls) == 1 + strategy.passes - 1 == 4 and METHODS["advbn"].passes() == 7
    assert all(not m._forward_hooks for m in model.modules() if m is not model)
    assert snapshot(model)[2] == before[2]


@pytest.mark.parametrize("fails_in_call", [1, 2, 3])
def test_nothing_is_left_after_an_exception(fails_in_call, model, data):
    before, calls = snapshot(model), []

    def criterion(output, targets):
        calls.append(1)
        if len(calls) == fails_in_call:
            raise RuntimeError("user's criterion")
        return cross_entropy(output, targets)

    with pytest.raises(RuntimeError, match="user's criterion"):
        create_strategy("advbn", model, steps=2).accumulate_gradients(*data, criterion)
    assert snapshot(model) == before
    assert not any(m._forward_hooks for m in model.modules()) and all(p.requires_grad for p in model.parameters())


class Pair(nn.Module):
    """A layer whose output is a pair, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.bn, self.pair, self.unused, self.fc = nn.BatchNorm2d(3), Two(), nn.Linear(3, 3), nn.Linear(3, 5)

    def forward(self, x):
        return self.fc(sum(self.pair(self.bn(x))).mean((2, 3)))


class Two(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    "hyper, said",
    [
        ({"layer": "layre1"}, "unknown layer 'layre1': did you mean 'layer1'"),
        ({"layer": ""}, "unknown layer ''"),
        ({"layer": 1}, "layer=1: the layer is named, for instance layer='layer1'"),
        ({"epsilon": -0.1}, "epsilon=-0.1: the radius must be a finite number >= 0"),
        ({"step_size": float("nan")}, "step_size=nan: the size of a step must be a finite number >= 0"),
        ({"steps": 0}, "steps=0: the number of steps of the ascent must be an integer >= 1"),
        ({"steps": 1.5}, r"steps=1\.5: the number of steps"),
    ],
)
def test_out_of_range(hyper, said):
    model = build("test_resnet")
    with pytest.raises(ApartError, match=said) as caught:
        create_strategy("advbn", model, **hyper)
    assert "\n" not in str(caught.value)
    with pytest.raises(ApartError):
        create_strategy("advbn", model).set(**hyper)


@pytest.mark.parametrize(
    "layer, said",
    [
        ("auto", "layer='auto': Pair has no feature_info that tells its first stage; name one of its 4 layers"),
        ("pair", "layer='pair': the output of 'pair' is no tensor of features"),
        ("unused", "layer='unused': 'unused' was not called in the pass"),
    ],
)
def test_layers_that_have_no_features(layer, said):
    model = Pair().double()
    with pytest.raises(ApartError, match=said):
        create_strategy("advbn", model, layer=layer).accumulate_gradients(*batch(8, 8), cross_entropy)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_compiled_model_is_perturbed_as_it_is(data):
    found = []
    for compiled in (False, True):
        model = build("small", dtype=torch.float32)
        torch._dynamo.reset()
        network = torch.compile(model, backend="eager") if compiled else model
        strategy = create_strategy("advbn", network, layer="bn1", steps=2)
        strategy.accumulate_gradients(*data, cross_entropy)
        found.append(gradients(model) | dict(enumerate(strategy.perturbations[0]._leaves)))
    torch._dynamo.reset()
    assert_same(*found, tolerance=1e-5)
