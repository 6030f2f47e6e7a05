"""A whole run in this process: what it leaves, that it repeats, what it says of its export."""

import json
import multiprocessing
from pathlib import Path

import pytest
import safetensors.torch
import timm
import yaml

from apart_hf.config.train_config import TrainConfig
from apart_hf.runs.train import train
from tests.support.helpers import assert_same, write_demo
from tests.support.processes import TIMING


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """64 training and 40 test images of the demo set as a parquet folder."""
    return write_demo(tmp_path_factory.mktemp("data") / "little", train=64, test=40)


@pytest.mark.parametrize("method", ["standard", "apart", "sam", "apart-sam"])
def test_a_run_repeats_exactly(method, tmp_path, small_data):
    runs = []
    for name in ("a", "b"):
        hyper = {"groups": 4, "ratio": 0.5} if "apart" in method else {}
        folder = train(
            TrainConfig(
                model="test_resnet",
                method=method,
                data_dir=small_data,
                batch_size=16,
                epochs=2,
                mixup=0.2,
                lr=0.01,
                output=str(tmp_path),
                experiment=name,
                **hyper,
            )
        )
        state = safetensors.torch.load_file(folder / "last" / "model.safetensors")
        history = lines(folder)
        for line in history:
            for key in TIMING:
                del line[key]
        runs.append((state, history))
    assert_same(runs[0][0], runs[1][0], tolerance=0)
    assert runs[0][1] == runs[1][1] and len(runs[0][1]) == 2


def test_the_run_folder(tmp_path, small_data, drawn):
    folder = train(
        TrainConfig(
            model="test_resnet",
            data_dir=small_data,
            batch_size=16,
            groups=2,
            epochs=4,
            decay_milestones=[1, 3],
            output=str(tmp_path),
            channels_last=True,
            clip_grad=1.0,
            smoothing=0.1,
        )
    )
    assert folder == tmp_path / "little-test_resnet-apart"
    history = lines(folder)
    assert " ".join(history[0]) == "epoch train_loss train_top1 images_per_second seconds eval_loss top1 top5 lr"
    assert [line["epoch"] for line in history] == [1, 2, 3, 4]
    assert [line["lr"] for line in history] == pytest.approx([0.1, 0.01, 0.01, 0.001])  # after epochs 1 and 3
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["batch_size"], config["weight_decay"], config["sched"]) == (16, 5e-4, "multistep")
    assert (config["epsilon"], config["groups"], config["val_split"], config["input_key"]) == (0.1, 2, "test", "image")
    assert (config["data_dir"], config["img_size"]) == (small_data, 28)
    assert config["num_classes"] == 10 and config["amp_dtype"] == "float32"
    exported = json.loads((folder / "last" / "config.json").read_text())
    assert exported["apart"]["dataset"] == "little" and exported["apart"]["results"]["epoch"] == 4
    assert exported["label_names"][9] == "Ankle boot" and str(tmp_path) not in json.dumps(exported)
    assert (folder / "plots" / "training.png").read_bytes().startswith(b"\x89PNG")
    best = json.loads((folder / "best" / "config.json").read_text())["apart"]["results"]
    assert best["top1"] == max(line["top1"] for line in history)
    assert (
        train(
            TrainConfig(  # the same command again does not touch the first run
                model="test_resnet", data_dir=small_data, batch_size=16, groups=2, max_steps=1, output=str(tmp_path)
            )
        )
        == tmp_path / "little-test_resnet-apart-2"
    )


def test_fewer_evaluations_change_nothing_else(tmp_path, small_data, drawn):
    def run_of(interval):
        folder = train(
            TrainConfig(
                model="test_resnet",
                data_dir=small_data,
                batch_size=16,
                groups=2,
                epochs=5,
                val_interval=interval,
                output=str(tmp_path),
                experiment=f"every-{interval}",
            )
        )
        results = json.loads((folder / "last" / "config.json").read_text())["apart"]["results"]
        best = json.loads((folder / "best" / "config.json").read_text())["apart"]["results"]
        return [{k: line[k] for k in line if k not in TIMING} for line in lines(folder)], results, best

    every, last, _ = run_of(1)
    second, last_of_second, best = run_of(2)
    assert second == [
        line if line["epoch"] in (2, 4, 5) else {k: line[k] for k in ("epoch", "train_loss", "train_top1", "lr")}
        for line in every
    ]
    assert last_of_second == last and last["epoch"] == 5
    assert best["top1"] == max(every[epoch - 1]["top1"] for epoch in (2, 4, 5))


def test_our_own_architecture_says_what_it_needs(tmp_path, small_data, capsys, spoken):
    folder = train(
        TrainConfig(
            model="wide_resnet40_2", method="sam", data_dir=small_data, batch_size=8, max_steps=1, output=str(tmp_path)
        )
    )
    assert f"import apart_hf and timm.create_model('local-dir:{folder}/last'" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{folder}/last", pretrained=True)
    assert model.num_classes == 10 and model.pretrained_cfg["label_names"][9] == "Ankle boot"


def test_loader_processes_end_with_the_run(tmp_path, small_data):
    common = {"model": "test_resnet", "data_dir": small_data, "batch_size": 16, "groups": 2, "epochs": 1}
    train(TrainConfig(**common, loader="workers", workers=2, output=str(tmp_path)))
    assert multiprocessing.active_children() == []


def test_workers_and_bfloat16_and_a_tracker(tmp_path, small_data):
    pytest.importorskip("tensorboard")
    folder = train(
        TrainConfig(
            model="test_resnet",
            method="apart-sam",
            data_dir=small_data,
            batch_size=16,
            groups=2,
            epochs=1,
            workers=1,
            amp_dtype="bfloat16",
            report_to=["tensorboard"],
            output=str(tmp_path),
        )
    )
    assert len(lines(folder)) == 1 and list(folder.rglob("events.out.tfevents*"))
