"""A run that was cut off goes on exactly: weights and metrics bit for bit those of a run that was not."""

import contextlib
import json
import resource
import shutil

import pytest
import torch
from datasets import DatasetDict

from apart_hf import ApartError
from apart_hf.cli.train import main
from apart_hf.runs.checkpoints import Checkpoints, damage
from apart_hf.runs.folder import RunFolder
from apart_hf.runs.train import train
from apart_hf.training.epoch_metrics import Evaluation
from apart_hf.utils.files import sha256
from tests.support.helpers import PUSHED, REPO, arrived, demo_rows
from tests.support.processes import assert_equal_runs, latest, result
from tests.support.settings import settings

CASES = {
    "standard": {"method": "standard", "drop": 0.3, "mixup": 0.2},
    "apart": {"method": "apart", "groups": 2, "ratio": 0.5, "model_ema": True, "every": 2, "epsilon_warmup_epochs": 1},
    "apart, workers": {"method": "apart", "groups": 2, "loader": "workers", "workers": 1, "reprob": 0.5},
    "apart, stream": {"method": "apart", "groups": 2, "streaming": True, "shuffle_buffer": 20},
    "sam": {"method": "sam", "grad_accum_steps": 2, "opt": "adamw", "lr": 1e-3, "checkpoint_every": "1"},
    "apart-sam": {"method": "apart-sam", "groups": 2, "amp_dtype": "bfloat16", "sched": "cosine", "warmup_epochs": 1},
    "gsam": {"method": "gsam", "rho_min": 0.01, "sched": "cosine", "grad_accum_steps": 2},
    "advbn": {"method": "advbn", "steps": 2, "ratio": 0.5, "aux_affine": True},
    "as timm, by epoch": {
        "method": "apart",
        "groups": 2,
        "sched": "step",
        "decay_epochs": 1.0,
        "warmup_epochs": 1,
        "warmup_prefix": True,
        "lr_noise": [0.5],
        "layer_decay": 0.7,
        "mixup": 0.3,
        "cutmix": 1.0,
        "mixup_mode": "elem",
        "mixup_prob": 0.8,
        "mixup_off_epoch": 2,
        "bce_loss": True,
        "clip_grad": 0.02,
        "clip_mode": "agc",
        "bn_momentum": 0.3,
        "scale": [0.5, 1.0],
        "vflip": 0.5,
        "reprob": 0.5,
        "remode": "rand",
        "recount": 3,
    },
    "as timm, repeats": {
        "method": "standard",
        "opt": "adamw",
        "opt_eps": 1e-3,
        "opt_betas": [0.8, 0.9],
        "opt_kwargs": ["amsgrad=True"],
        "sched": "cosine",
        "cooldown_epochs": 1,
        "aug_repeats": 2.0,
        "hflip": 0.3,
        "vflip": 0.3,
        "clip_grad": 0.01,
        "clip_mode": "value",
        "smoothing": 0.1,
        "gp": "catavgmax",
        "epochs": 1,
    },
    "apart, from the second epoch": {
        "method": "apart",
        "groups": 2,
        "perturb_from_epoch": 2,
        "epsilon_warmup_epochs": 1,
        "every": 2,
        "grad_accum_steps": 2,
        "checkpoint_every": "1",
    },
    "sam, a step of the second epoch": {
        "method": "sam",
        "perturb_from_epoch": 2,
        "max_steps": 12,
        "model_ema": True,
        "checkpoint_every": "1",
    },
    "random-bn": {"method": "random-bn", "groups": 2, "val_fraction": 0.25, "batch_size": 9, "ratio": 2 / 3},
}


@pytest.mark.parametrize("case", CASES)
def test_from_any_checkpoint_on_nothing_differs(case, little, tmp_path):
    whole = train(settings(little, tmp_path / "whole", **CASES[case]))
    steps = sorted(path.name for path in (whole / "checkpoints").glob("step-*"))
    assert len(steps) > 5
    for number, keep in enumerate([1, len(steps) // 2]):
        part = shutil.copytree(whole, tmp_path / f"part{number}" / "run")
        for name in steps[keep:]:
            shutil.rmtree(part / "checkpoints" / name)
        again = train(settings(little, part.parent, **CASES[case], resume="auto"))
        assert again == part
        assert_equal_runs(whole, again)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_known_rows_goes_on(workers, tmp_path):
    rows = {"train": demo_rows("train").select(range(72)), "test": demo_rows("test").select(range(30))}
    DatasetDict(rows).save_to_disk(str(tmp_path / "saved"))
    more = {"streaming": True, "workers": workers, "reprob": 0.5}
    whole = train(settings(str(tmp_path / "saved"), tmp_path / "whole", **more))
    part = shutil.copytree(whole, tmp_path / "part" / "run")
    steps = sorted((part / "checkpoints").glob("step-*"))
    for step in steps[len(steps) // 2 :]:  # the rest begins within an epoch
        shutil.rmtree(step)
    train(settings(str(tmp_path / "saved"), part.parent, **more, resume="auto"))
    assert_equal_runs(whole, part)


def test_the_case_without_a_checkpoint_starts_anew(little, tmp_path, trained_here):
    one = trained_here
    shutil.rmtree(one / "checkpoints")
    before = result(one)
    train(settings(little, tmp_path, resume="auto"))
    assert result(one)[0] == before[0]


def test_a_finished_run_says_so(little, tmp_path, capsys, spoken, trained_here):
    one = trained_here
    stamp = (one / "last/model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert train(settings(little, tmp_path, resume=str(one))) == one
    assert "is finished: 2 epochs, 18 steps" in capsys.readouterr().out
    assert (one / "last/model.safetensors").stat().st_mtime_ns == stamp


def test_auto_means_the_last_run_of_the_name(little, tmp_path, monkeypatch):
    """Without --experiment a further run is numbered, and it is that one which was cut off."""
    data, output = little, tmp_path / "out"
    more = {"experiment": None, "epochs": 1}
    first = train(settings(data, output, **more))
    second = train(settings(data, output, **more, seed=1))
    assert second.name == f"{first.name}-2"
    for checkpoint in sorted((second / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(checkpoint)
    before = (first / "metrics.jsonl").stat().st_mtime_ns
    whole = shutil.copytree(second, tmp_path / "whole")
    assert train(settings(data, output, **more, seed=1, resume="auto")) == second
    assert_equal_runs(whole, second)
    assert (first / "metrics.jsonl").stat().st_mtime_ns == before
    other = train(settings(data, output, **more, method="sam", resume="auto"))
    assert other.name == first.name.replace("standard", "sam")  # there was none: it starts anew


def test_a_run_that_was_cut_off_before_it_was_pushed(hub, quickly, little, tmp_path, capsys, spoken):
    train(settings(little, tmp_path, epochs=1))
    train(settings(little, tmp_path, epochs=1, resume="auto", push_to_hub=REPO))
    assert "is finished" in capsys.readouterr().out and arrived(hub) == PUSHED


def test_a_longer_run_goes_on(little, tmp_path):
    train(settings(little, tmp_path, sched="none"))
    with pytest.raises(ApartError, match=r"other settings: epochs \(was 2, now 3\).*--override"):
        train(settings(little, tmp_path, sched="none", resume="auto", epochs=3))
    longer = train(settings(little, tmp_path, sched="none", resume="auto", epochs=3, override=True))
    fresh = train(settings(little, tmp_path / "fresh", sched="none", epochs=3))
    assert_equal_runs(fresh, longer)


@pytest.mark.parametrize("harm", ["cut", "flipped", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(harm, little, tmp_path, capsys, spoken, trained_here):
    one = trained_here
    want = result(one)
    latest = sorted((one / "checkpoints").glob("step-*"))[-1]
    file = latest / "optimizer.bin"
    content = file.read_bytes()
    if harm == "cut":
        file.write_bytes(content[:-1])
    elif harm == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        (latest / "manifest.json" if harm == "no manifest" else file).unlink()
    assert damage(latest)
    train(settings(little, tmp_path, resume="auto"))
    assert f"checkpoint {latest.name} is passed over" in capsys.readouterr().out
    assert result(one)[0] == want[0]


def kept(run):
    return [int(path.name.removeprefix("step-")) for path in sorted((run / "checkpoints").glob("step-*"))]


def test_old_checkpoints_go_but_for_that_of_the_best_epoch(little, tmp_path, monkeypatch):
    losses = [3.0, 1.0, 2.0, 2.5]
    found = iter([*losses, *losses[2:]])
    monkeypatch.setattr("apart_hf.training.trainer.evaluate", lambda *_: Evaluation(next(found), 0.0, 0.0))
    more = {"checkpoint_hist": 2, "eval_metric": "eval_loss", "epochs": 4}
    one = train(settings(little, tmp_path, **more))
    assert kept(one) == [18, 34, 36]
    for folder in sorted((one / "checkpoints").glob("step-*"))[1:]:
        (folder / "run.pt").unlink()
    # back to the best one, which is still known as such; the damaged ones of later steps do not take the place of new
    train(settings(little, tmp_path, **more, resume="auto"))
    assert kept(one) == [18, 34, 36] and [line["eval_loss"] for line in result(one)[0]] == losses
    assert all(damage(folder) is None for folder in (one / "checkpoints").glob("step-*"))


def test_what_cannot_be_resumed(little, tmp_path, trained_here):
    with pytest.raises(ApartError, match=r"--resume nowhere: there is no checkpoint"):
        train(settings(little, tmp_path, resume="nowhere"))
    one = trained_here
    folder = sorted((one / "checkpoints").glob("step-*"))[-1]
    shared = torch.load(folder / "run.pt", weights_only=True) | {"processes": 2}
    torch.save(shared, folder / "run.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"run.pt": sha256(folder / "run.pt")}))
    with pytest.raises(ApartError, match=r"is of 2 process\(es\), and 1 were started"):
        train(settings(little, tmp_path, resume="auto"))
    assert Checkpoints(one / "checkpoints", None).newest()[0] == folder


@contextlib.contextmanager
def no_file_beyond(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_a_checkpoint_and_no_more(little, tmp_path, monkeypatch, capsys):
    """No file may grow beyond 100 KB: weights cannot be written, training goes on where it can."""
    write = Checkpoints._write

    def limited(self, *arguments):
        with no_file_beyond(100_000) if self.all() else contextlib.nullcontext():
            write(self, *arguments)

    monkeypatch.setattr(Checkpoints, "_write", limited)
    flags = "--model test_resnet --method standard -b 8 --epochs 1 --checkpoint-every 3 --experiment run"
    main([*flags.split(), "--data-dir", little, "--output", str(tmp_path)])
    said = capsys.readouterr().out
    assert "warning: no checkpoint at step 6" in said and "step-00000003 stays" in said
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000003"]
    assert damage(tmp_path / "run/checkpoints/step-00000003") is None


def test_no_room_for_the_weights_of_an_epoch(little, tmp_path, monkeypatch, trained):
    write = RunFolder._export

    def limited(*arguments):
        with no_file_beyond(100_000):
            write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_export", limited)
        with pytest.raises(ApartError, match=r"^cannot write .*run \(.*File too large.*\); make room there,.*--resume"):
            train(settings(little, tmp_path))
    assert not (tmp_path / "run/last").exists() and latest(tmp_path / "run").name == "step-00000008"
    assert_equal_runs(trained, train(settings(little, tmp_path, resume="auto")))
