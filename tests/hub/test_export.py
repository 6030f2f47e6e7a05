"""What may be exported: only what config.json gives again."""

import json
import os
import sys

import pytest
import safetensors.torch
import timm
import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import nn

from apart_hf import ApartError, create_strategy
from apart_hf.data import data_config
from apart_hf.hub.export import export_folder
from apart_hf.utils.files import sha256
from tests.support.helpers import batch, build, run


def export(model, folder, size=32):
    images = data_config(model.pretrained_cfg, (size, size))
    export_folder(
        model,
        folder / "model",
        data_config=images,
        label_names=list("abcde"),
        tag="t",
        apart={"method": "apart"},
        license="mit",
    )


def resnet(alter=None, **kwargs):
    model = build("resnet18", dtype=torch.float32, **kwargs)
    if alter is not None:
        alter(model)
    return model


def test_the_record_of_a_folder(tmp_path):
    export(resnet(act_layer="gelu"), tmp_path)
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["apart"] == {"method": "apart", "sha256": sha256(tmp_path / "model/model.safetensors")}
    assert config["pretrained_cfg"]["license"] == "mit" and config["model_args"]["act_layer"] == "gelu"
    assert {entry.name for entry in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    "alter, message",
    [
        (lambda m: setattr(m, "maxpool", nn.Identity()), "'maxpool' has Identity.* where timm builds MaxPool2d"),
        (
            lambda m: setattr(m, "conv1", nn.Conv2d(3, 64, 3, 1, 1, bias=False)),
            "'conv1' has Conv2d.*kernel_size=.3, 3.",
        ),
        (lambda m: setattr(m.layer1[0], "act1", nn.GELU()), r"'layer1\.0\.act1' has GELU"),
        (lambda m: setattr(m, "fc", nn.Sequential(nn.Linear(512, 5))), "'fc' has Sequential"),
        (lambda m: setattr(m.layer2[0].bn1, "eps", 1e-3), r"'layer2\.0\.bn1' has BatchNorm2d.*eps=0.001"),
        (lambda m: m.layer1.append(nn.Tanh()), r"'layer1\.2' was added"),
        (lambda m: m.layer4.__delitem__(1), r"'layer4\.1' was removed"),
        (
            lambda m: setattr(m.global_pool.pool, "forward", lambda x: x.amax((2, 3))),
            r"'global_pool\.pool' has a forward",
        ),
        (lambda m: m.layer3.register_forward_hook(lambda *a: a[-1] * 2), "'layer3' gives another output"),
        (lambda m: m.register_forward_hook(lambda *a: a[-1] * 2), "the network gives another output"),
        (lambda m: m.register_parameter("delta", nn.Parameter(torch.zeros(3))), "the network has parameters"),
        (
            lambda m: m.layer1[1].conv2.__setattr__("weight", m.layer1[1].conv1.weight),
            r"'layer1\.1\.conv2\.weight' shares",
        ),
    ],
)
def test_an_altered_model_is_refused_with_the_layer_s_name(alter, message, tmp_path):
    with pytest.raises(ApartError, match=message) as error:
        export(resnet(alter), tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_refused_export_leaves_the_earlier_one(tmp_path):
    export(resnet(), tmp_path)
    before = (tmp_path / "model/model.safetensors").read_bytes()
    with pytest.raises(ApartError):
        export(resnet(lambda m: setattr(m, "maxpool", nn.Identity()), seed=1), tmp_path)
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("test_efficientnet", {}),
        ("wide_resnet16_2", {}),
        ("resnet18", {"act_layer": "gelu", "global_pool": "max"}),
        ("levit_128s", {"size": 224}),
        ("resnet18", {"drop_rate": 0.2, "drop_path_rate": 0.1, "drop_block_rate": 0.1}),
    ],
)
def test_what_create_model_took_is_recorded(name, kwargs, tmp_path):
    size = kwargs.pop("size", 32)
    model = convert_sync_batchnorm(build(name, dtype=torch.float32, **kwargs))
    model.eval()
    export(model, tmp_path, size)
    again = timm.create_model(f"local-dir:{tmp_path}/model", pretrained=True).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(model(images), again(images))


@pytest.mark.parametrize("more", [{}, {"dynamo_backend": "eager"}])
def test_a_model_that_accelerate_prepared_for_16_bits(more, tmp_path):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", **more)
    model = accelerator.prepare(resnet())
    export(accelerator.unwrap_model(model, keep_torch_compile=False), tmp_path)
    assert "_original_forward" in vars(accelerator.unwrap_model(model, keep_torch_compile=False))  # as it was


def test_training_goes_on_as_before(tmp_path):
    model = resnet()
    generator = torch.get_rng_state()
    export(model, tmp_path)
    assert model.training and torch.equal(torch.get_rng_state(), generator) and not model._forward_hooks


@pytest.mark.process
def test_timm_alone_gives_the_same_logits_bit_for_bit(tmp_path):
    """After a training step, of weights in either memory layout; loaded by a process that does not know us."""
    images, targets = batch(8, dtype=torch.float32)
    safetensors.torch.save_file({"images": images}, tmp_path / "in.safetensors")
    models = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        model = build("resnet18", dtype=torch.float32).to(memory_format=layout)
        folder = tmp_path / str(len(models))
        models[folder] = model
        create_strategy("apart", model, groups=2).accumulate_gradients(images, targets, nn.functional.cross_entropy)
        keys = list(model.state_dict())
        config = data_config(model.pretrained_cfg, (32, 32)) | {"mean": (0.1,) * 3, "std": (0.2,) * 3}
        for _ in range(2):  # the second replaces the first
            export_folder(model, folder / "m", data_config=config, label_names=list("abcde"), tag="t", apart={"a": 1})
        assert {p.name for p in folder.iterdir()} == {"m"} and os.access(folder / "m/model.safetensors", os.R_OK)
        assert list(model.state_dict()) == keys
    code = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
for folder in sys.argv[2:]:
    model = timm.create_model(f"local-dir:{folder}/m", pretrained=True).eval()
    assert "apart_hf" not in sys.modules
    cfg = model.pretrained_cfg
    assert cfg["tag"] == "t" and cfg["label_names"] == list("abcde") and not cfg.get("license")
    assert cfg["input_size"] == (3, 32, 32) and list(cfg["std"]) == [0.2] * 3 and model.num_classes == 5
    with torch.no_grad():
        save_file({"out": model(load_file(sys.argv[1])["images"])}, f"{folder}/out.safetensors")
"""
    result = run(sys.executable, "-c", code, tmp_path / "in.safetensors", *models)
    assert result.returncode == 0, result.stderr
    torch.set_num_threads(1)
    for folder, model in models.items():
        with torch.no_grad():
            want = model.to(memory_format=torch.contiguous_format).eval()(images)
        assert torch.equal(safetensors.torch.load_file(folder / "out.safetensors")["out"], want)
