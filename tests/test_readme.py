"""The README is true: its code runs, its flags exist, its tables are the code's own."""

import re
import shlex
from pathlib import Path

import pytest

from apart_hf import push, validate
from apart_hf.command_line import parse_arguments
from apart_hf.data import DATASETS
from apart_hf.recipes import RECIPES
from apart_hf.strategies import METHODS

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_loop_runs():
    (loop,) = blocks("python")
    scope = {}
    exec(loop, scope)
    assert scope["loss"].isfinite() and scope["output"].shape == (32, 10)


def test_every_train_command_parses():
    shell = "".join(blocks("bash")).splitlines()
    commands = [shlex.split(line) for line in shell if "scripts/train.py" in line]
    assert len(commands) == 8
    for command in commands:
        parse_arguments(command[command.index("scripts/train.py") + 1:])


def test_every_flag_exists(capsys):
    for command in (parse_arguments, push.main, validate.main):
        with pytest.raises(SystemExit):
            command(["--help"])
    flags = capsys.readouterr().out
    prose = re.sub(r"```.*?```|`python [^`]*`", "", README, flags=re.S)  # other programs have flags of their own
    assert all(flag in flags for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose))


def test_the_table_of_methods():
    rows = dict(re.findall(r"^\| `([a-z][a-z-]*)` \|[^|]*\|([^|]*)\|[^|]*\|$", README, re.M))
    assert rows.keys() == METHODS.keys()
    for name, cell in rows.items():
        documented = {key: float(value) for key, value in re.findall(r"`(\w+)` \(([\d.]+)\)", cell)}
        numbers = {k: v for k, v in METHODS[name].hyper_parameters().items() if not isinstance(v, bool)}
        assert documented == numbers


def test_every_recipe_is_described():
    stems = re.findall(r"`((?:cifar|tiny|imagenet)[a-z0-9-]*-(?:wrn40|preact18|resnet18))`", README)
    assert {name.rsplit(method, 1)[0] for name, method in
            ((n, f"-{s['method']}") for n, s in RECIPES.items())} == set(stems)


def test_every_dataset_is_named():
    assert all(f"`{name}`" in README for name in DATASETS)
