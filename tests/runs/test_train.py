"""The trainer and the run folder, on real images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from accelerate import Accelerator
from torch import nn

from apart_hf import create_strategy
from apart_hf.config.train_config import TrainConfig
from apart_hf.hub.export import export_folder
from apart_hf.runs.train import train
from apart_hf.training.metrics import TopKAccuracy
from apart_hf.training.trainer import Trainer
from apart_hf.utils.processes import cores
from tests.support.helpers import FAST, ROOT, assert_same, batch, build, run, write_demo
from tests.support.processes import TIMING

RUN_FILES = {"config.yaml", "metrics.jsonl", "best", "last", "plots", "checkpoints"}


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """64 training and 40 test images of the demo set as a parquet folder."""
    return write_demo(tmp_path_factory.mktemp("data") / "little", train=64, test=40)


LOAD_WITHOUT_US = """
import json, sys, timm, torch
from datasets import load_dataset
folder, data = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
rows = load_dataset("parquet", data_files=data, split="train")
with torch.no_grad():
    logits = torch.cat([model(torch.stack([transform(i.convert("RGB")) for i in rows[s:s + 100]["image"]]))
                        for s in range(0, len(rows), 100)])
assert "apart_hf" not in sys.modules
labels = torch.tensor(rows["label"][:])
print(json.dumps({"eval_loss": torch.nn.functional.cross_entropy(logits, labels).item(),
                  "top1": 100 * (logits.argmax(1) == labels).double().mean().item(),
                  "top5": 100 * (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()}))
"""


def test_launch_train_and_load_with_timm_alone(tmp_path):
    """The README's command, shortened: the exported model, loaded without us, has the metrics of the last epoch."""
    launch = (sys.executable, "-m", "accelerate.commands.launch")
    result = run(*launch, ROOT / "scripts/train.py", *FAST, "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "demo-test_resnet-apart"
    assert {entry.name for entry in folder.iterdir()} == RUN_FILES
    for name in ("best", "last"):
        assert {entry.name for entry in (folder / name).iterdir()} == {"config.json", "model.safetensors"}
    assert f"{cores()} thread(s)" in result.stdout  # accelerate launch asks for one
    assert "bundled demo set" in result.stdout and "--dataset cifar100" in result.stdout
    loaded = run(sys.executable, "-c", LOAD_WITHOUT_US, folder / "last", ROOT / "apart_hf/data/demo/test.parquet")
    assert loaded.returncode == 0, loaded.stderr
    want, got = lines(folder)[-1], json.loads(loaded.stdout)
    assert got["eval_loss"] == pytest.approx(want["eval_loss"], rel=1e-5)
    assert got["top1"] == pytest.approx(want["top1"], abs=0.1) and got["top5"] == pytest.approx(want["top5"], abs=0.1)


@pytest.mark.parametrize("channels_last", [False, True])
def test_exported_folder_gives_the_same_logits_bit_for_bit(tmp_path, channels_last):
    model = build("resnet18", dtype=torch.float32)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    images, targets = batch(8, dtype=torch.float32)
    create_strategy("apart", model, groups=2).accumulate_gradients(images, targets, nn.functional.cross_entropy)
    keys = list(model.state_dict())
    config = {
        "input_size": (3, 32, 32),
        "mean": (0.1,) * 3,
        "std": (0.2,) * 3,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "crop_mode": "center",
    }
    for _ in range(2):  # the second replaces the first
        export_folder(model, tmp_path / "m", data_config=config, label_names=list("abcde"), tag="t", apart={"a": 1})
    assert {p.name for p in tmp_path.iterdir()} == {"m"} and os.access(tmp_path / "m/model.safetensors", os.R_OK)
    assert list(model.state_dict()) == keys
    safetensors.torch.save_file({"images": images}, tmp_path / "in.safetensors")
    code = (
        "import sys, timm, torch, safetensors.torch as s; t = sys.argv[1]; torch.set_num_threads(1)\n"
        "m = timm.create_model(f'local-dir:{t}/m', pretrained=True).eval(); assert 'apart_hf' not in sys.modules\n"
        "c = m.pretrained_cfg; assert c['tag'] == 't' and c['label_names'] == list('abcde') and not c.get('license')\n"
        "assert c['input_size'] == (3, 32, 32) and list(c['std']) == [0.2] * 3 and m.num_classes == 5\n"
        "with torch.no_grad(): out = m(s.load_file(f'{t}/in.safetensors')['images'])\n"
        "s.save_file({'out': out}, f'{t}/out.safetensors')"
    )
    result = run(sys.executable, "-c", code, tmp_path)
    assert result.returncode == 0, result.stderr
    torch.set_num_threads(1)
    with torch.no_grad():
        want = model.to(memory_format=torch.contiguous_format).eval()(images)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out.safetensors")["out"], want)


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


def test_the_run_folder(tmp_path, small_data):
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


def test_fewer_evaluations_change_nothing_else(tmp_path, small_data):
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


class Recorder(nn.Module):
    """Keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.bn, self.fc, self.seen = nn.BatchNorm2d(3), nn.Linear(3, 5), []

    def forward(self, x):
        self.seen.append(x.clone())
        return self.fc(self.bn(x).square().mean((2, 3)))


def trainer(model, *, method="apart", rows=10, batch_size=4, **more):
    accelerator = Accelerator(cpu=True)
    images, labels = batch(rows, 8, dtype=torch.float32)
    loader = torch.utils.data.DataLoader(list(zip(images, labels.tolist())), batch_size=batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    hyper = {"groups": 2} if method == "apart" else {}
    strategy = create_strategy(method, model, accelerator=accelerator, **hyper)
    return Trainer(accelerator, model, strategy, optimizer, None, nn.CrossEntropyLoss(), loader, loader, **more)


def test_both_passes_see_the_same_mixed_images():
    model = Recorder()
    one = trainer(model, mixup=timm.data.Mixup(mixup_alpha=1.0, num_classes=5, label_smoothing=0.1), rows=8)
    one.train_epoch("test")
    assert len(model.seen) == 4
    assert torch.equal(model.seen[0], model.seen[1]) and torch.equal(model.seen[2], model.seen[3])
    assert not torch.equal(model.seen[0], batch(8, 8, dtype=torch.float32)[0][:4])  # they were mixed


def test_clipping_happens_once_on_the_combined_gradient():
    torch.manual_seed(0)
    model = Recorder()
    one = trainer(model, clip_grad=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    model.train()
    one.train_step(*batch(4, 8, dtype=torch.float32))
    moved = torch.sqrt(sum((p - q).square().sum() for p, q in zip(model.parameters(), before)))
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_evaluation_counts_every_image_once():
    torch.manual_seed(0)
    model = Recorder()
    one = trainer(model, rows=10)  # batches of 4, 4 and 2
    images, labels = batch(10, 8, dtype=torch.float32)
    found = one.evaluate(one.val_loader)
    with torch.no_grad():
        output = model.eval()(images)
    assert found.eval_loss == pytest.approx(nn.functional.cross_entropy(output, labels).item(), rel=1e-6)
    assert found.top1 == pytest.approx(100 * (output.argmax(1) == labels).float().mean().item())
    assert found.top5 == 100


def test_the_metric():
    metric = TopKAccuracy()
    metric.add_batch(predictions=[[1, 2, 3, 4, 5], [0, 1, 2, 3, 4]], references=[1, 4])
    metric.add_batch(predictions=[[1, 2, 3, 4, 5], [7, 1, 2, 3, 4]], references=[9, 7])
    assert metric.compute() == {"top1": 50.0, "top5": 75.0}


def test_two_processes(tmp_path, small_data):
    result = run(
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        ROOT / "scripts/train.py",
        "--model",
        "test_resnet",
        "--data-dir",
        small_data,
        "-b",
        "16",
        "--groups",
        "4",
        "--epochs",
        "2",
        "--output",
        tmp_path,
        ACCELERATE_USE_CPU="true",
    )
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "little-test_resnet-apart"
    assert "2 process(es)" in result.stdout and len(lines(folder)) == 2
    assert {entry.name for entry in folder.iterdir()} == RUN_FILES
    loaded = run(sys.executable, "-c", LOAD_WITHOUT_US, folder / "last", f"{small_data}/test.parquet")
    assert json.loads(loaded.stdout)["eval_loss"] == pytest.approx(lines(folder)[-1]["eval_loss"], rel=1e-4)


def test_the_wheel_works_elsewhere(tmp_path):
    """Built from the tracked files, unpacked into a folder of its own: trains on the data inside it."""
    source = tmp_path / "source"
    source.mkdir()
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    built = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source)
    assert built.returncode == 0, built.stderr
    wheel = next(tmp_path.glob("apart_hf-*.whl"))
    installed = run(*pip, "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    assert installed.returncode == 0, installed.stderr
    assert (tmp_path / "site/apart_hf/data/demo/LICENSE").exists()
    result = run(
        sys.executable,
        "-m",
        "apart_hf",
        "train",
        *FAST,
        "--output",
        tmp_path / "out",
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert result.returncode == 0, result.stderr
    code = (
        "import apart_hf as a; "
        "print(a.__file__, [a.load_pretrained(name)[0].num_classes for name in a.list_pretrained()])"
    )
    where = run(sys.executable, "-c", code, PYTHONPATH=str(tmp_path / "site"))
    assert where.stdout.startswith(str(tmp_path)) and "[10, 10]" in where.stdout, where.stderr
