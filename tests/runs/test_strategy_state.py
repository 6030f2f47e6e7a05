"""What a checkpoint keeps of the strategy: where it is in `every`, and what it was set to."""

import json
import shutil

import pytest
import torch

from apart_hf import ApartError
from apart_hf.runs.train import train
from apart_hf.strategies.two_pass import TwoPassStrategy
from apart_hf.utils.files import sha256
from tests.support.processes import assert_equal_runs, latest
from tests.support.settings import settings

MORE = {"method": "apart", "groups": 2, "ratio": 0.5, "every": 3, "checkpoint_every": "1", "epochs": 1, "threads": 1}


@pytest.fixture(scope="module")
def whole(little, tmp_path_factory):
    """Nine steps, of which the third, sixth and ninth have a second pass."""
    return train(settings(little, tmp_path_factory.mktemp("whole"), **MORE))


def until(run, step, folder, change=lambda content: None):
    """A copy that was cut off after a step; `change` alters what its checkpoint holds."""
    part = shutil.copytree(run, folder / "run")
    for name in sorted((part / "checkpoints").glob("step-*"))[step:]:
        shutil.rmtree(name)
    manifest = latest(part) / "manifest.json"
    sums = json.loads(manifest.read_text())
    for name in ("process-0.pt", "run.pt"):
        file = manifest.with_name(name)
        content = torch.load(file, weights_only=True)
        change(content)
        torch.save(content, file)
        sums[name] = sha256(file)
    manifest.write_text(json.dumps(sums))


@pytest.fixture
def passes(monkeypatch):
    """(epsilon, groups) of each step with a second pass."""
    seen, two_passes = [], TwoPassStrategy.two_passes

    def noted(strategy, *arguments):
        seen.append((strategy.hyper.get("epsilon"), strategy.hyper.get("groups")))
        return two_passes(strategy, *arguments)

    monkeypatch.setattr(TwoPassStrategy, "two_passes", noted)
    return seen


def test_checkpoints_of_earlier_versions_go_on_within_every(whole, little, tmp_path, passes):
    """Their strategy kept its generator alone, the trainer counted, and there were fewer settings."""

    def earlier(content):
        if "strategy" in content:
            content["strategy"] = {"generator": content["strategy"]["generator"]}
        else:
            del content["settings"]["epsilon_warmup_epochs"]

    until(whole, 2, tmp_path, earlier)
    with pytest.raises(ApartError, match=r"epsilon_warmup_epochs \(was 0, now 1\)"):
        train(settings(little, tmp_path, **MORE, epsilon_warmup_epochs=1, resume="auto"))
    assert passes == []
    assert_equal_runs(whole, train(settings(little, tmp_path, **MORE, resume="auto")))
    assert passes == [(0.1, 2)] * 3


@pytest.mark.parametrize(
    "change, want",
    [
        ({"epsilon": 0.3, "every": 2}, [(0.3, 2)] * 3),
        ({"method": "sam", "groups": None, "ratio": None}, [(None, None)] * 2),
    ],
    ids=str,
)
def test_overridden_settings_are_the_new_ones(change, want, whole, little, tmp_path, passes):
    """From the fourth step of nine on: every counts all steps, also those before."""
    until(whole, 3, tmp_path)
    train(settings(little, tmp_path, **MORE | change, resume="auto", override=True))
    assert passes == want


def test_epsilon_rises_in_a_straight_line(little, tmp_path, passes):
    """That it goes on so from any checkpoint is shown in `test_from_any_checkpoint_on_nothing_differs`."""
    more = {"every": 1, "epochs": 2, "epsilon": 0.2, "epsilon_warmup_epochs": 1, "checkpoint_every": None}
    one = train(settings(little, tmp_path, **MORE | more))
    assert passes == [(pytest.approx(0.2 * min(1, step / 9)), 2) for step in range(18)] and passes[0][0] == 0
    record = json.loads((one / "last/config.json").read_text())["apart"]
    assert record["epsilon"] == 0.2 and record["settings"]["epsilon_warmup_epochs"] == 1


def test_plain_epochs_come_first(little, tmp_path, passes, spoken, capsys):
    """Epsilon rises from the first step that has a second pass; `every` counts the plain ones, too."""
    more = {"every": 2, "epochs": 3, "epsilon": 0.2, "epsilon_warmup_epochs": 1, "perturb_from_epoch": 2}
    one = train(settings(little, tmp_path, **MORE | more | {"checkpoint_every": None}))
    steps = [step for step in range(9, 27) if (step + 1) % 2 == 0]
    assert passes == [(pytest.approx(0.2 * min(1, (step - 9) / 9)), 2) for step in steps] and passes[0][0] == 0
    record = json.loads((one / "last/config.json").read_text())["apart"]
    assert record["settings"]["perturb_from_epoch"] == 2
    ratio = record.get("ratio", 1.0)
    assert record["passes"] == pytest.approx((9 + 18 * (1 + ratio / 2)) / 27)
    assert f"{record['passes']:g} passes a step on average, plain before epoch 2" in capsys.readouterr().out


@pytest.mark.parametrize("steps, perturbed", [(7, 0), (9, 0), (12, 3), (None, 9)])
def test_the_passes_of_a_run_that_ends_by_its_steps(steps, perturbed, little, tmp_path, passes):
    more = {"epochs": 2, "perturb_from_epoch": 2, "max_steps": steps, "checkpoint_every": None, "method": "ghost-bn"}
    one = train(settings(little, tmp_path, groups=2, **more))
    record = json.loads((one / "last/config.json").read_text())["apart"]
    assert len(passes) == perturbed and record["passes"] == pytest.approx(1 + perturbed / (steps or 18))


def test_another_first_epoch_is_refused_and_may_be_overridden(whole, little, tmp_path, passes):
    until(whole, 3, tmp_path)
    with pytest.raises(ApartError, match=r"perturb_from_epoch \(was 1, now 2\)"):
        train(settings(little, tmp_path, **MORE | {"epochs": 2}, perturb_from_epoch=2, resume="auto"))
    later = {"epochs": 2, "every": 1, "perturb_from_epoch": 2, "resume": "auto", "override": True}
    train(settings(little, tmp_path, **MORE | later))
    assert len(passes) == 9  # those of the second epoch
