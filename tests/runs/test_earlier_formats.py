"""A run that apart_hf 0.1.0 began, and was killed in, goes on; a checkpoint of a later format is refused.

`made_by_0.1.0` is what `python scripts/train.py ... --checkpoint-every 2 --resume auto` of commit 2c42bd7 had left of a
run of the command below when it was killed after step 12 of 20, without last/, best/ and plots/.
"""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from apart_hf import ApartError
from apart_hf.config.arguments import parse_arguments
from apart_hf.config.defaults import fill_defaults
from apart_hf.runs.checkpoint_state import FORMAT, CheckpointState
from apart_hf.runs.interruption import StopRequest
from apart_hf.runs.prepare import prepare
from tests.support.helpers import assert_same

MADE = Path(__file__).parent / "made_by_0.1.0"
COMMAND = (
    "--model test_resnet --model-kwargs channels=(8,8,16,16) --method apart --groups 2 --ratio 0.5 -b 8 "
    "--grad-accum-steps 2 --epochs 4 --lr 0.02 --sched cosine --model-ema --threads 1 --checkpoint-every 2 "
    "--checkpoint-hist 1 --resume auto --experiment old"
)


@pytest.fixture
def run(little, tmp_path):
    shutil.copytree(MADE, tmp_path / "old")
    config = parse_arguments([*COMMAND.split(), "--data-dir", little, "--output", str(tmp_path)])
    return prepare(fill_defaults(config), StopRequest())


def written(name):
    return torch.load(MADE / "checkpoints/step-00000012" / name, weights_only=True)


def test_it_is_taken_up_where_it_was_written(run):
    assert run.checkpoint.name == "step-00000012" and run.is_left
    trainer, shared, own = run.trainer, written("run.pt"), written("process-0.pt")
    assert "format" not in shared  # the first one
    network = run.accelerator.unwrap_model(trainer.model)
    assert_same(network.state_dict(), load_file(MADE / "checkpoints/step-00000012/model.safetensors"), tolerance=0)
    state = written("optimizer.bin")
    found = trainer.optimizer.state_dict()
    assert found["param_groups"] == state["param_groups"] and len(found["state"]) == len(list(network.parameters()))
    for number, kept in state["state"].items():
        assert torch.equal(found["state"][number]["momentum_buffer"], kept["momentum_buffer"])
    assert trainer.scheduler.state_dict() == shared["scheduler"]
    assert_same(trainer.ema.state_dict(), shared["ema"], tolerance=0)
    progress = trainer.progress
    assert (progress.steps, progress.epoch, progress.batch) == (12, 2, 4)
    assert torch.equal(progress.totals, own["totals"]) and own["totals"][2] == 32
    assert torch.equal(trainer.strategy.state_dict()["generator"], own["strategy"]["generator"])
    assert torch.equal(torch.get_rng_state(), own["random"]["torch"])
    assert [metrics.as_line() for metrics in run.history.epochs] == shared["history"]
    assert run.checkpoints.best == shared["best"] == 5


def test_it_finishes(run):
    run.fit()
    folder = run.finish()
    lines, before = ((place / "metrics.jsonl").read_text().splitlines() for place in (folder, MADE))
    assert len(lines) == 4 and lines[:2] == before
    assert json.loads((folder / "last/config.json").read_text())["apart"]["results"]["epoch"] == 4
    assert timm.create_model(f"local-dir:{folder}/last", pretrained=True).num_classes == 10
    assert torch.load(max(folder.glob("checkpoints/step-*")) / "run.pt", weights_only=True)["format"] == FORMAT


def test_a_later_format_is_refused():
    with pytest.raises(ApartError, match=f"step-1 is of format {FORMAT + 1}, and this apart_hf reads formats up to"):
        CheckpointState.from_dict({"format": FORMAT + 1}, Path("step-1"))
    with pytest.raises(ApartError, match="step-1 lacks 'steps'; remove it"):
        CheckpointState.from_dict({"format": FORMAT}, Path("step-1"))
