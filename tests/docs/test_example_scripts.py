"""Every script of examples/ runs for two steps, each in both passes, and is as short as it says."""

import importlib
import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

from apart_hf.strategies.algorithm import Algorithm
from tests.support.helpers import ROOT

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(file.stem for file in EXAMPLES.glob("*.py"))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script's main in an empty folder: what it returns, and how many second passes it made."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    passes, second_pass = [], Algorithm._second_pass

    def counted(self, *args):
        passes.append(1)
        return second_pass(self, *args)

    monkeypatch.setattr(Algorithm, "_second_pass", counted)

    demo_data = importlib.import_module("demo_data")
    read = demo_data.demo_images
    monkeypatch.setattr(demo_data, "demo_images", lambda split, count: read(split, min(count, 96)))

    def main(name, *args, **named):
        found = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*args, **named)
        return found, len(passes)

    return main


def share_of(output):
    """The accuracy that it says last, as a share."""
    return float(re.findall(r"accuracy ([\d.]+)%", output)[-1]) / 100


def test_scripts_are_those_of_the_documents_and_short():
    examples = "accelerate_loop amp demo_data lightning_module load_checkpoint own_loop timm_train transformers_trainer"
    assert examples.split() == SCRIPTS
    text = (ROOT / "docs/LOOPS.md").read_text()
    for name in SCRIPTS:
        assert f"examples/{name}.py" in text and len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


@pytest.mark.parametrize("name", ["own_loop", "amp"])
def test_loops(name, run, capsys):
    accuracy, passes = run(name, steps=2)
    output = capsys.readouterr().out
    assert passes == 2 and share_of(output) == pytest.approx(accuracy, abs=1e-3) and "step 0: loss 2." in output


@pytest.mark.parametrize("name, passes", [("accelerate_loop", 4), ("timm_train", 2)])
def test_loops_that_save(name, passes, run, capsys, tmp_path):
    (tmp_path / "saved").mkdir()
    assert run(name, steps=2, folder=str(tmp_path / "saved"))[1] == passes
    assert share_of(capsys.readouterr().out) >= 0
    (file,) = [f for f in (tmp_path / "saved").iterdir() if f.name.startswith(("custom_checkpoint", "last"))]
    state = torch.load(file, weights_only=False)
    state = state.get("task_state", state).get("apart_hf", state)
    assert state["steps"] == 2 and state["hyper"]["epsilon"] == 0.1


def test_transformers_trainer(run, capsys):
    flags = {"max_steps": 2, "apart_method": "apart-sam", "disable_tqdm": True, "use_cpu": True}
    accuracy, passes = run("transformers_trainer", [f"--{name}={value}" for name, value in flags.items()])
    output = capsys.readouterr().out
    assert passes == 2 and "after 2 steps of apart-sam" in output
    assert share_of(output) == pytest.approx(accuracy, abs=1e-3)
    assert Path("output/transformers/checkpoint-2/trainer_state.json").exists()


def test_lightning_module(run, capsys):
    quiet = {f"enable_{part}": False for part in ("checkpointing", "progress_bar", "model_summary")}
    accuracy, passes = run("lightning_module", steps=2, accelerator="cpu", **quiet)
    assert passes == 2 and share_of(capsys.readouterr().out) == pytest.approx(accuracy, abs=1e-3)


def test_load_checkpoint(run, capsys, finished):
    assert run("load_checkpoint", count=100)[0] > 0.8
    assert "the first image is Shirt, and labelled Shirt" in capsys.readouterr().out
    assert 0 < run("load_checkpoint", str(finished), count=50)[0] <= 1


def hunks(diff):
    """(first line, lines before, lines after) of each part of a unified diff."""
    for first, olds, news, text in re.findall(r"^@@ -(\d+),(\d+) \+\d+,(\d+) @@\n((?:[ +-].*\n?)+)", diff, re.M):
        lines = text.splitlines()
        old, new = ([line[1:] for line in lines if line[0] in f" {sign}"] for sign in "-+")
        assert (len(old), len(new)) == (int(olds), int(news))
        yield int(first), old, new


def test_the_patch_of_timm_s_script_adds_the_lines_of_the_document():
    diff, document = (EXAMPLES / "timm_train.diff").read_text(), (ROOT / "docs/TIMM.md").read_text()
    added = [re.findall(r"^\+(?!\+\+)(.+)$", text, re.M) for text in (diff, document)]
    assert added[0] == added[1] and len(list(hunks(diff))) == 2


@pytest.mark.skipif("TIMM_TRAIN" not in os.environ, reason="TIMM_TRAIN=path/to/timm's/train.py names the script")
def test_the_patch_applies(tmp_path):
    (tmp_path / "train.py").write_text(Path(os.environ["TIMM_TRAIN"]).read_text())
    subprocess.run(["patch", "-p1", "-i", EXAMPLES / "timm_train.diff"], cwd=tmp_path, check=True)
    assert 'task = apart(task, "apart"' in (tmp_path / "train.py").read_text()
