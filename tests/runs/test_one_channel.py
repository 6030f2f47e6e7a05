"""A run on grey images in one channel: recorded, exported, loaded by timm, measured again, and fine-tuned."""

import json
import re

import pytest
import timm
import torch
import yaml
from timm.data import create_transform, resolve_model_data_config

from apart_hf import ApartError, load_pretrained
from apart_hf.cli.validate import main as validate_command
from apart_hf.config.train_config import TrainConfig
from apart_hf.hub.card import make_card
from apart_hf.runs.model import make_model
from apart_hf.runs.train import train
from tests.support.helpers import demo_rows, load
from tests.support.settings import settings


@pytest.fixture(scope="module")
def grey(little, tmp_path_factory):
    return train(settings(little, tmp_path_factory.mktemp("grey"), in_chans=1, mean=[0.3], std=[0.35], threads=1))


def exported(folder):
    return json.loads((folder / "last/config.json").read_text())


def test_it_is_recorded_and_exported(grey):
    config = exported(grey)
    assert config["model_args"]["in_chans"] == config["apart"]["settings"]["in_chans"] == 1
    assert yaml.safe_load((grey / "config.yaml").read_text())["in_chans"] == 1
    model = timm.create_model(f"local-dir:{grey}/last", pretrained=True).eval()
    found = resolve_model_data_config(model)
    assert tuple(found["input_size"]) == (1, 28, 28) and (list(found["mean"]), list(found["std"])) == ([0.3], [0.35])


def test_timm_measures_the_same(grey):
    """By its own transform of images that are read as its validation reads them, in mode L."""
    model = timm.create_model(f"local-dir:{grey}/last", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    rows = demo_rows("test").select(range(30))
    with torch.no_grad():
        logits = model(torch.stack([transform(image.convert("L")) for image in rows["image"]]))
    line = json.loads((grey / "metrics.jsonl").read_text().splitlines()[-1])
    labels = torch.tensor(rows["label"][:])
    assert 100 * (logits.argmax(1) == labels).double().mean().item() == pytest.approx(line["top1"])
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(line["eval_loss"], rel=1e-5)


def test_it_is_measured_again(grey, little, capsys):
    validate_command(["--checkpoint", str(grey), "--data-dir", little])
    assert "it holds (difference +0.00)" in capsys.readouterr().out


def test_the_transform_takes_images_of_any_mode(grey):
    model, transform = load_pretrained(str(grey))
    image = demo_rows("test")[0]["image"]
    found = [transform(image.convert(mode)) for mode in ("L", "RGB")]
    assert torch.equal(*found) and model(found[0][None]).shape == (1, 10)


def test_the_card_is_of_grey_images(grey, capsys, monkeypatch):
    text = make_card(grey, "user/grey").content
    assert "for grey images of 28x28 pixels" in text and "timm's own reader does not turn" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(code.replace("hf_hub:user/grey", f"local-dir:{grey}/last"), {})
    assert capsys.readouterr().out.strip() in load().class_names


def test_model_kwargs_do_the_same(grey, little, tmp_path):
    again = train(settings(little, tmp_path, model_kwargs=["in_chans=1"], mean=[0.3], std=[0.35]))
    assert (again / "last/model.safetensors").read_bytes() == (grey / "last/model.safetensors").read_bytes()
    assert exported(again)["pretrained_cfg"]["input_size"] == [1, 28, 28]


def test_a_model_of_one_channel_goes_on_with_one(grey, little, tmp_path):
    more = train(settings(little, tmp_path, model=f"local-dir:{grey}/last", pretrained=True, epochs=1))
    config = exported(more)
    assert config["pretrained_cfg"]["input_size"] == [1, 28, 28] and config["pretrained_cfg"]["mean"] == [0.3]


def test_a_run_does_not_go_on_with_other_channels(grey, little):
    with pytest.raises(ApartError, match=r"cannot go on with in_chans \(was 1, now None\)"):
        train(settings(little, grey.parent, mean=[0.3], std=[0.35], epochs=3, resume="auto", override=True))


@pytest.mark.parametrize("name", ["wide_resnet16_2", "preact_resnet18", "test_byobnet", "levit_128s", "rexnet_100"])
def test_models_are_made_for_one_channel(name):
    config = TrainConfig(model=name, in_chans=1, img_size=224 if name == "levit_128s" else 32)
    model, images = make_model(config, load())
    assert images["input_size"][0] == 1 and images["mean"] == (0.286,) and images["std"] == (0.353,)
    assert model(torch.zeros(2, *images["input_size"])).shape == (2, 10)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"in_chans": 2}, "--in-chans 2: images are read with 1 channel .* or 3 .* only"),
        ({"in_chans": 4}, "--in-chans 4: images are read with 1 channel .* or 3 .* only"),
        ({"in_chans": 0}, "--in-chans 0: images are read with 1 channel .* or 3 .* only"),
        ({"model_kwargs": ["in_chans=5"]}, "--model-kwargs in_chans=5: images are read with 1 channel .* or 3 .* only"),
        ({"model_kwargs": ["in_chans=grey"]}, "--model-kwargs in_chans=grey: images are read"),
        ({"model_kwargs": ["in_chans=[1]"]}, r"--model-kwargs in_chans=\[1\]: images are read"),
        ({"model_kwargs": ["in_chans=True"]}, "--model-kwargs in_chans=True: images are read"),
        ({"in_chans": 1, "model_kwargs": ["in_chans=3"]}, "--in-chans 1 and --model-kwargs in_chans=3 are different"),
        ({"in_chans": 1, "mean": [0.1, 0.2, 0.3]}, r"--mean 0.1 0.2 0.3: needs one value, or .* \(1\)"),
        ({"std": [0.1, 0.2]}, r"--std 0.1 0.2: needs one value, or .* \(3\)"),
        ({"in_chans": 1, "input_size": [3, 28, 28]}, "--input-size 3 28 28: .*grey ones are 1 N N, with --in-chans 1"),
        ({"model_kwargs": ["global_pool="]}, "global_pool= turns the pooling .* off.*leave it out.*avg, max"),
        ({"model_kwargs": ["global_pool=None"]}, "global_pool= turns the pooling .* off"),
    ],
)
def test_what_cannot_be(more, message):
    with pytest.raises(ApartError, match=message) as error:
        TrainConfig(**more)
    assert "\n" not in str(error.value)


def test_what_fits_is_taken():
    assert TrainConfig(in_chans=1, input_size=[1, 28, 28]).input_size == [1, 28, 28]
    assert TrainConfig(in_chans=3, model_kwargs=["in_chans=3"]).in_chans == 3
    assert TrainConfig(mean=[0.5], std=[0.1, 0.2, 0.3]).mean == [0.5]


@pytest.mark.parametrize("pool", ["max", "avgmax", "catavgmax"])
def test_other_poolings_are_trained_and_exported(pool, little, tmp_path):
    folder = train(settings(little, tmp_path, model_kwargs=[f"global_pool={pool}"], epochs=1))
    model = timm.create_model(f"local-dir:{folder}/last", pretrained=True)
    assert model.global_pool.pool_type == pool


def test_arguments_of_the_model_may_be_to_blame():
    message = r"try --img-size 224, the model's own, or leave --model-kwargs drop_rate=0.1 out\.$"
    with pytest.raises(ApartError, match=message) as error:
        make_model(TrainConfig(model="vgg11_bn", model_kwargs=["drop_rate=0.1"]), load())
    assert "\n" not in str(error.value)
