"""Flags that a timm user knows: what each of them does."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

from apart_hf import ApartError
from apart_hf.cli.train import main
from apart_hf.config.checks import check_names
from apart_hf.config.defaults import fill_defaults
from apart_hf.config.train_config import TrainConfig
from apart_hf.data import Loaders, LoaderSettings
from apart_hf.runs.train import train
from tests.support.helpers import FAST, build, load
from tests.support.settings import CONFIG


def settled(tmp_path, *arguments):
    main([*FAST, *arguments, "--output", str(tmp_path), "--experiment", "run"])
    return yaml.safe_load((tmp_path / "run/config.yaml").read_text())


def test_model_kwargs_reach_the_constructor_and_the_exported_folder(tmp_path):
    settled(tmp_path, "--model-kwargs", "act_layer=gelu", "channels=(16, 16, 24, 24)")
    model = timm.create_model(f"local-dir:{tmp_path}/run/last", pretrained=True)
    assert type(model.act1).__name__ == "GELU" and model.layer1[0].conv1.out_channels == 16
    assert json.loads((tmp_path / "run/last/config.json").read_text())["model_args"]["act_layer"] == "gelu"


@pytest.mark.parametrize("form", ["model.safetensors", "state.pth", "nested.pth"])
def test_an_initial_checkpoint(form, tmp_path):
    source = build("test_resnet", num_classes=7, dtype=torch.float32)
    state, file = source.state_dict(), tmp_path / form
    if form.endswith("safetensors"):
        safetensors.torch.save_file(state, file)
    else:
        torch.save({"state_dict": state} if form.startswith("nested") else state, file)
    from apart_hf.runs.model import load_weights

    model = timm.create_model("test_resnet", num_classes=10)
    head = model.fc.weight.clone()
    load_weights(model, str(file))
    assert torch.equal(model.fc.weight, head)  # 10 classes, not 7
    for key, value in model.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, state[key])
    same = timm.create_model("test_resnet", num_classes=7)
    load_weights(same, str(file))
    assert torch.equal(same.fc.weight, source.fc.weight)


class Evil:
    def __reduce__(self):
        import os

        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "there is no such file"),
        (b"x", "cannot be read"),
        ("other", "weights are of another model"),
        ("pickle", "cannot be read"),
    ],
)
def test_a_bad_initial_checkpoint(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "start.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "other":
        torch.save({"a": torch.zeros(3)}, file)
    elif content == "pickle":
        torch.save({"a": Evil()}, file)
    with pytest.raises(ApartError, match=message) as error:
        train(TrainConfig(model="test_resnet", initial_checkpoint=str(file), output=str(tmp_path / "out")))
    assert "\n" not in str(error.value) and not (tmp_path / "evil").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, lr",
    [
        (["--lr-base", "0.8", "-b", "32"], 0.1),
        (["--lr-base", "0.8", "-b", "32", "--grad-accum-steps", "2"], 0.2),
        (["--lr-base", "0.8", "--lr-base-size", "64"], 0.4),
        (["--lr-base", "0.8", "--lr-base-scale", "sqrt"], 0.8 / 8**0.5),
        (["--lr-base", "0.8", "--lr", "0.3"], 0.3),
    ],
)
def test_the_learning_rate_grows_with_the_batch(arguments, lr, tmp_path):
    assert settled(tmp_path, *arguments)["lr"] == pytest.approx(lr)


def test_short_names():
    assert fill_defaults(TrainConfig(amp=True)).amp_dtype == "bfloat16"
    assert fill_defaults(TrainConfig(amp=True, amp_dtype="float16")).amp_dtype == "float16"
    assert fill_defaults(TrainConfig(input_size=[3, 64, 64])).img_size == 64
    assert fill_defaults(TrainConfig(log_wandb=True, report_to=["tensorboard"])).report_to == ["tensorboard", "wandb"]


def test_wandb_is_asked_for_by_either_flag(monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    for config in (TrainConfig(log_wandb=True), TrainConfig(report_to=["wandb"])):
        with pytest.raises(ApartError, match="--report-to wandb: not installed"):
            check_names(config)


def test_a_class_map_orders_the_classes(tmp_path):
    names, file = load().class_names, tmp_path / "classes.txt"
    file.write_text("\n".join(reversed(names)) + "\n")
    data = load(class_map=str(file))
    assert data.class_names == names[::-1]
    assert (data.train.labels() == 9 - load().train.labels()).all()
    assert data.val.cells([3])[0][1] == 9 - load().val.cells([3])[0][1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a\nb\n", "12 class names are not in both"),
        ("", "needs class names"),
        ("a\na\n", "needs class names"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_class_map(text, message, tmp_path):
    file = tmp_path / "classes.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ApartError, match=message):
        load(class_map=str(file))


def test_best_is_chosen_by_the_metric(tmp_path):
    folder = train(TrainConfig(model="test_resnet", max_steps=3, epochs=1, eval_metric="top5", output=str(tmp_path)))
    assert (folder / "best").is_dir()


@pytest.mark.parametrize("workers", [0, 2])
def test_any_augmented_batch_can_be_drawn_again(workers):
    """By the per-image transforms too: what is drawn depends on (seed, epoch, batch) alone, in any process."""
    settings = LoaderSettings(CONFIG, 40, 40, "workers", workers, augmentation={"aa": "rand-m9-mstd0.5", "reprob": 0.5})
    data = load()
    data = dataclasses.replace(data, train=data.train.part(np.arange(120)))
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)  # as in a run
    accelerator = Accelerator(cpu=True, dataloader_config=order)
    loader = Loaders(data, settings, accelerator).train()
    again = Loaders(data, dataclasses.replace(settings, workers=0), accelerator).train()
    for epoch in (1, 0):
        loader.set_epoch(epoch)
        first = list(loader)
        again.set_epoch(epoch)
        torch.rand(7)  # whatever else is drawn in between
        for (a, x), (b, y) in zip(first, again, strict=True):
            assert torch.equal(a, b) and torch.equal(x, y)
    again.set_epoch(2)
    assert not torch.equal(next(iter(again))[0], first[0][0])


def test_augmentation_leaves_the_global_generators_alone():
    dataset = Loaders(load(), LoaderSettings(CONFIG, 40, 40, "workers"), Accelerator(cpu=True)).train().dataset
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    dataset.__getitems__([1, 2, 3])
    assert torch.equal(torch.rand(3), want)
