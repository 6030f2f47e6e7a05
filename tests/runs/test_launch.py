"""The README's command as users start it: by accelerate's launcher, and by torchrun on two processes."""

import json
import sys

import pytest

from apart_hf.utils.processes import cores
from tests.support.helpers import FAST, ROOT, run
from tests.support.plain_timm import metrics

RUN_FILES = {"config.yaml", "metrics.jsonl", "best", "last", "plots", "checkpoints"}

pytestmark = pytest.mark.process


def last_line(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_launch_train_and_load_with_timm_alone(tmp_path):
    """The README's command, shortened: the exported model, loaded without us, has the metrics of the last epoch."""
    launch = (sys.executable, "-m", "accelerate.commands.launch")
    result = run(*launch, ROOT / "scripts/train.py", *FAST, "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "demo-test_resnet-apart"
    assert {entry.name for entry in folder.iterdir()} == RUN_FILES
    for name in ("best", "last"):
        assert {entry.name for entry in (folder / name).iterdir()} == {
            "class_map.txt",
            "config.json",
            "model.safetensors",
        }
    assert f"{cores()} thread(s)" in result.stdout  # accelerate launch asks for one
    assert "bundled demo set" in result.stdout and "--dataset cifar100" in result.stdout
    script, data = ROOT / "tests/support/plain_timm.py", ROOT / "apart_hf/data/demo/test.parquet"
    loaded = run(sys.executable, script, folder / "last", data)
    assert loaded.returncode == 0, loaded.stderr
    want, got = last_line(folder), json.loads(loaded.stdout)
    assert got["eval_loss"] == pytest.approx(want["eval_loss"], rel=1e-5)
    assert got["top1"] == pytest.approx(want["top1"], abs=0.1) and got["top5"] == pytest.approx(want["top5"], abs=0.1)


def test_two_processes(little, tmp_path):
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2".split()
    flags = "--model test_resnet -b 16 --groups 4 --epochs 2"
    places = ["--data-dir", little, "--output", tmp_path]
    result = run(*launch, ROOT / "scripts/train.py", *flags.split(), *places, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "little-test_resnet-apart"
    assert "2 process(es)" in result.stdout and last_line(folder)["epoch"] == 2
    assert {entry.name for entry in folder.iterdir()} == RUN_FILES
    found = metrics(folder / "last", f"{little}/test.parquet")
    assert found["eval_loss"] == pytest.approx(last_line(folder)["eval_loss"], rel=1e-4)


def test_two_processes_that_accelerate_does_not_join(tmp_path):
    """Each of them would train by itself, into the same folder."""
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2".split()
    result = run(*launch, ROOT / "scripts/train.py", *FAST, "--output", tmp_path / "runs", ACCELERATE_USE_CPU="false")
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("train.py: error: ")]
    assert "2 processes were started (WORLD_SIZE=2)" in said and said.endswith("set ACCELERATE_USE_CPU=true.")
    assert "exitcode  : 2 " in result.stderr and result.returncode != 0
    assert not any(tmp_path.iterdir())
