"""Our architectures behave like timm's own."""

import pytest
import timm
import torch

import apart_hf  # noqa: F401


@pytest.mark.parametrize(
    "name, classes, parameters",
    [
        ("wide_resnet16_2", 100, 703_284),
        ("wide_resnet40_2", 100, 2_255_156),
        ("wide_resnet28_10", 100, 36_536_884),
        ("preact_resnet18", 10, 11_171_274),  # the published 11,171,146, and the BN after the stem
    ],
)
def test_parameter_counts_are_the_published_ones(name, classes, parameters):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_preact_resnet18_is_the_authors():
    """BN and ReLU after a stride-1 stem, four stages, torch's own initialisation, nothing after the last block."""
    torch.manual_seed(0)
    model = timm.create_model("preact_resnet18", num_classes=10).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        y = torch.relu(model.bn1(model.conv1(x)))
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            y = stage(y)
        assert y.shape == (2, 512, 4, 4) and torch.equal(model(x), model.head.fc(y.mean((2, 3))))
    weight = model.layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx((1 / (3 * 512 * 9)) ** 0.5, rel=0.02)  # uniform within 1/sqrt(fan-in)
    assert model.head.fc.bias.any()
    features = timm.create_model("preact_resnet18", features_only=True)
    assert features.feature_info.channels() == [64, 128, 256, 512]
    features.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head")})
    with torch.no_grad():
        found, stem = features.eval()(x), torch.relu(model.bn1(model.conv1(x)))
        assert torch.equal(found[0], model.layer1(stem)) and torch.equal(found[-1], model.forward_features(x))
    assert [f.shape[-1] for f in found] == [32, 16, 8, 4]
    assert "bn1.weight" in timm.models.group_parameters(model, model.group_matcher())[0]
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)


def test_initialised_as_in_the_cited_code():
    model = timm.create_model("wide_resnet40_2", num_classes=100)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)
    assert not model.head.fc.bias.any() and model.head.fc.weight.std().item() == pytest.approx(1 / 384**0.5, rel=0.1)


def test_blocks_are_pre_activated_and_shortcuts_take_the_activated_input():
    model = timm.create_model("wide_resnet40_2", num_classes=10).eval()
    block = model.layer2[0]
    x = torch.randn(2, 32, 8, 8)
    a = torch.relu(block.bn1(x))
    want = block.conv2(torch.relu(block.bn2(block.conv1(a)))) + block.shortcut(a)
    assert torch.equal(block(x.clone()), want)
    assert model.layer2[1].shortcut is None and len(model.layer2) == 6


def test_what_timm_expects_of_a_model():
    model = timm.create_model("wide_resnet40_2", num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 7)
    assert model.forward_features(x).shape == (2, 128, 8, 8)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.get_classifier().out_features == 3
    assert timm.create_model("wide_resnet40_2", num_classes=0).eval()(x).shape == (2, 128)
    features = timm.create_model("wide_resnet40_2", features_only=True)
    assert [f.shape for f in features(x)] == [(2, 32, 32, 32), (2, 64, 16, 16), (2, 128, 8, 8)]
    assert features.feature_info.channels() == [32, 64, 128]
    assert timm.create_model("wide_resnet40_2", in_chans=1)(torch.randn(2, 1, 32, 32)).shape == (2, 100)
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.4914, 0.4822, 0.4465)


def test_gradient_checkpointing_changes_nothing():
    model = timm.create_model("wide_resnet40_2", num_classes=4).train()
    x, grads = torch.randn(4, 3, 16, 16), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*grads))
