"""What wandb is told by timm's flags, by accelerate's own class."""

import sys
import types

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType

from apart_hf import ApartError
from apart_hf.config.train_config import TrainConfig
from apart_hf.runs.train import train
from tests.support.settings import settings


@pytest.fixture
def wandb(monkeypatch):
    """A module of that name, which keeps what accelerate tells it."""
    told = types.ModuleType("wandb")
    told.started, told.lines, told.settings = [], [], {}
    told.config = types.SimpleNamespace(update=lambda values, **_: told.settings.update(values))
    run = types.SimpleNamespace(log=lambda values, step: told.lines.append((step, values)), finish=lambda: None)
    told.init = lambda **given: told.started.append(given) or run
    monkeypatch.setitem(sys.modules, "wandb", told)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.WANDB])
    return told


@pytest.mark.parametrize(
    "given, started",
    [
        ({"wandb_project": "mine", "wandb_tags": ["apart", "first"]}, {"project": "mine", "tags": ["apart", "first"]}),
        ({"project": "ours"}, {"project": "ours"}),
        ({}, {"project": "apart_hf"}),
    ],
)
def test_its_project_and_tags(given, started, wandb, little, tmp_path):
    train(settings(little, tmp_path, epochs=1, max_steps=2, checkpoint_every=None, log_wandb=True, **given))
    (options,) = wandb.started
    assert {key: options.get(key) for key in ("project", "tags")} == {"tags": None} | started
    assert wandb.settings["lr"] == 0.02 and wandb.settings["project"] == started["project"]
    assert any("eval/top1" in values for _, values in wandb.lines)


def test_two_projects_are_refused():
    with pytest.raises(ApartError, match="--project a and --wandb-project b are the same; leave one out"):
        TrainConfig(project="a", wandb_project="b")
    with pytest.raises(ApartError, match="--wandb-project 'a/b': must be a plain name"):
        TrainConfig(wandb_project="a/b")
