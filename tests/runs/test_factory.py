"""Models with settings of BatchNorm and pooling, and with weights in the place of timm's; and what they export."""

import json

import pytest
import safetensors.torch
import timm
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf import ApartError, load_pretrained
from apart_hf.runs.factory import create_model
from apart_hf.runs.train import train
from tests.support.settings import settings


def batchnorms(model):
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]


def values(model, name):
    return {getattr(layer, name) for layer in batchnorms(model)}


@pytest.mark.parametrize("model", ["test_efficientnet", "mobilenetv3_small_050", "test_resnet", "preact_resnet18"])
def test_batchnorm_s_momentum_is_that_of_every_layer(model):
    made = create_model(model, num_classes=5, bn_momentum=0.25)
    assert values(made, "momentum") == {0.25} and values(made, "eps") == values(timm.create_model(model), "eps")


def test_its_eps_where_timm_builds_any():
    made = create_model("test_efficientnet", num_classes=5, bn_eps=0.01)
    assert values(made, "eps") == {0.01} and values(made, "momentum") == {0.1}
    with pytest.raises(ApartError, match=r"--bn-eps 0\.01: timm builds 'test_resnet' with its own epsilon alone"):
        create_model("test_resnet", num_classes=5, bn_eps=0.01, bn_momentum=0.2)


def test_other_wrong_arguments_are_said_as_before():
    with pytest.raises(TypeError, match="nonsense"):
        create_model("test_resnet", bn_momentum=0.2, nonsense=1)


def run(little, tmp_path, **more):
    return train(settings(little, tmp_path, epochs=1, max_steps=2, checkpoint_every=None, **more))


def record(folder):
    return json.loads((folder / "last/config.json").read_text())


def test_an_export_gives_the_eps_again(little, tmp_path):
    folder = run(little, tmp_path, model="test_efficientnet", bn_eps=0.05, bn_momentum=0.3)
    again = timm.create_model(f"local-dir:{folder}/last", pretrained=True)
    assert values(again, "eps") == {0.05} and values(again, "momentum") == {0.3}
    written = record(folder)
    assert written["model_args"]["bn_eps"] == 0.05
    assert written["apart"]["settings"]["bn_eps"] == 0.05 and written["apart"]["settings"]["bn_momentum"] == 0.3


@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_a_momentum_weighs_the_batches(momentum, little, tmp_path):
    """After one step the running mean of the first layer is that share of the batch's mean, which seeds fix."""
    one = train(settings(little, tmp_path / "a", epochs=1, max_steps=1, checkpoint_every=None, bn_momentum=1.0))
    two = train(settings(little, tmp_path / "b", epochs=1, max_steps=1, checkpoint_every=None, bn_momentum=momentum))
    means = [
        safetensors.torch.load_file(folder / "last/model.safetensors")["conv1.1.running_mean"] for folder in (one, two)
    ]
    assert torch.allclose(means[1], momentum * means[0], rtol=1e-5) and means[0].abs().max() > 1e-3
    load_pretrained(str(two))  # an export whose momentum timm does not say is whole all the same


@pytest.mark.parametrize("pool, features", [("max", 1), ("avgmax", 1), ("catavgmax", 2)])
def test_a_pooling_is_exported(pool, features, little, tmp_path):
    folder = run(little, tmp_path, gp=pool)
    written = record(folder)
    assert written["global_pool"] == written["model_args"]["global_pool"] == pool
    again = timm.create_model(f"local-dir:{folder}/last", pretrained=True)
    plain = timm.create_model("test_resnet", num_classes=10)
    assert again.fc.in_features == features * plain.fc.in_features and again.global_pool.pool_type == pool


def test_a_pooling_that_is_not_there(little, tmp_path):
    with pytest.raises(ApartError, match="cannot create model 'test_resnet': Invalid pool type: mid"):
        run(little, tmp_path, gp="mid")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def source():
    torch.manual_seed(3)
    return timm.create_model("test_resnet", num_classes=10)


def saved(model, file, form="plain"):
    if file.suffix == ".safetensors":
        safetensors.torch.save_file(model.state_dict(), file)
    else:
        torch.save({"state_dict": model.state_dict()}, file)
    return str(file)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_weights_that_stand_for_timm_s(name, source, tmp_path):
    file = saved(source, tmp_path / name)
    torch.manual_seed(0)
    made = create_model("test_resnet", num_classes=10, weights=file)
    for key, value in made.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]) != key.startswith("fc."), key  # always another classifier
    grey = create_model("test_resnet", num_classes=10, in_chans=1, weights=file)
    assert torch.allclose(grey.conv1[0].weight, source.conv1[0].weight.sum(1, keepdim=True))
    assert made.pretrained_cfg["state_dict"] is None  # it would be exported


def test_a_run_from_such_weights(source, little, tmp_path):
    file = saved(source, tmp_path / "mine.pth")
    folder = run(little, tmp_path / "out", pretrained_path=file, pretrained=True, lr=0.0)
    weights = safetensors.torch.load_file(folder / "last/model.safetensors")
    assert torch.equal(weights["conv1.0.weight"], source.conv1[0].weight)
    written = record(folder)
    assert written["apart"]["settings"]["pretrained_path"] == "mine.pth" and written["apart"]["base_model"] is None
    assert str(tmp_path) not in (folder / "last/config.json").read_text()


def test_weights_of_another_model(source, tmp_path):
    file = saved(source, tmp_path / "w.pth")
    with pytest.raises(ApartError, match="its weights are of another model") as error:
        create_model("test_efficientnet", num_classes=10, weights=file)
    assert "\n" not in str(error.value)
    for change in (lambda state: state.pop("layer2.0.bn1.weight"), lambda state: state.update(extra=torch.zeros(1))):
        state = dict(source.state_dict())
        change(state)
        torch.save(state, file)
        with pytest.raises(
            ApartError, match=r"another model .1 of their names differ, the first is '(layer2\.0\.bn1|extra)"
        ):
            create_model("test_resnet", num_classes=10, weights=file)
    with pytest.raises(ApartError, match=r"--pretrained-path .*none\.pth: there is no such file"):
        create_model("test_resnet", weights=str(tmp_path / "none.pth"))
