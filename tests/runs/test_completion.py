"""A config is completed in two steps, fill_defaults and fill_from_data, and is what it is from then on."""

import ast
import dataclasses
import typing
from pathlib import Path

import pytest
import yaml

import apart_hf
from apart_hf.config.train_config import SETTINGS, CompleteConfig, FilledConfig, TrainConfig
from apart_hf.runs import prepare
from apart_hf.runs.train import train
from tests.support.settings import settings

SMALL = {"epochs": 1, "max_steps": 2, "checkpoint_every": None}


def test_nothing_is_changed_after_the_second_step(little, tmp_path, monkeypatch):
    finished, made, runs = [], [], []
    fill, start, run = prepare.fill_from_data, TrainConfig.__post_init__, prepare.Run

    def noted(*arguments, **more):
        finished.append(fill(*arguments, **more))
        made.clear()
        return finished[-1]

    monkeypatch.setattr(prepare, "fill_from_data", noted)
    monkeypatch.setattr(TrainConfig, "__post_init__", lambda self: (made.append(self), start(self))[1])
    monkeypatch.setattr(prepare, "Run", lambda *arguments, **more: (runs.append(run(*arguments, **more)), runs[-1])[1])
    folder = train(
        settings(little, tmp_path, method="apart", groups=2, experiment=None, lr=None, lr_base=0.8, amp=True, **SMALL)
    )
    (config,), (made_run,) = finished, runs
    assert type(config) is CompleteConfig
    assert made == [] and made_run.config is config and made_run.folder.config is config
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written == {key: value for key, value in vars(config).items() if SETTINGS[key].role != "command"}
    assert (config.experiment, config.lr, config.amp_dtype) == (folder.name, 0.8 * 8 / 256, "bfloat16")
    assert (config.img_size, config.num_classes, config.epsilon, config.threads is not None) == (28, 10, 0.1, True)
    assert (config.train_split, config.val_split, config.input_key, config.target_key) == (
        "train",
        "test",
        "image",
        "label",
    )


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 0.1


def test_the_two_steps_are_the_only_ones():
    """No config is replaced, nothing goes around the frozen class, and only the steps make a filled or complete one."""
    package, found = Path(apart_hf.__file__).parent, []
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, first = ast.unparse(node.func), ast.unparse(node.args[0]) if node.args else ""
            replaces = name in ("replace", "dataclasses.replace", "copy.replace")
            if (
                (replaces and first.rpartition(".")[2] == "config")
                or name == "object.__setattr__"
                or name.rpartition(".")[2] in ("FilledConfig", "CompleteConfig")
            ):
                found.append((file.relative_to(package).as_posix(), name))
    assert found == [("config/defaults.py", "FilledConfig"), ("config/defaults.py", "CompleteConfig")]


@pytest.mark.parametrize("config", [FilledConfig, CompleteConfig])
def test_a_narrower_type_is_the_setting_s_own_without_none(config):
    narrowed, wide = typing.get_type_hints(config), typing.get_type_hints(TrainConfig)
    assert narrowed.keys() == wide.keys() and narrowed != wide
    for name, hint in narrowed.items():
        assert hint == wide[name] or hint | None == wide[name]
        if hint != wide[name]:
            assert SETTINGS[name].default is None


def test_runs_that_start_together_get_folders_of_their_own(little, tmp_path, monkeypatch):
    """A run of the same name that begins while this one is prepared takes the name, not this one's way."""
    make = prepare._make_trainer

    def meanwhile(*arguments):
        (tmp_path / "little-test_resnet-standard").mkdir()
        return make(*arguments)

    monkeypatch.setattr(prepare, "_make_trainer", meanwhile)
    folder = train(settings(little, tmp_path, experiment=None, **SMALL))
    assert folder.name == "little-test_resnet-standard-2"
    assert yaml.safe_load((folder / "config.yaml").read_text())["experiment"] == folder.name
