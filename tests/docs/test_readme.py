"""The README is true: its code runs, its flags exist, its tables are the code's own."""

import re
import shlex
from pathlib import Path

import pytest

from apart_hf.__main__ import COMMANDS
from apart_hf.cli import analyse, pack, pull, push_to_hub, reproduce, validate
from apart_hf.config.arguments import parse_arguments
from apart_hf.config.recipes import RECIPES
from apart_hf.data import DATASETS
from apart_hf.strategies.methods import METHODS

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_loop_runs():
    (loop,) = blocks("python")
    scope = {}
    exec(loop, scope)
    assert scope["loss"].isfinite() and scope["output"].shape == (32, 10)


def commands(name):
    """The arguments of every command of this name, in any of its forms."""
    forms = re.compile(rf"(?:apart-hf|-m apart_hf) {name} |scripts/{name}\.py ")
    lines = "".join(blocks("bash")).splitlines()
    return [shlex.split(line[found.end() :]) for line in lines if (found := forms.search(line))]


def test_the_first_command_is_that_of_the_launcher():
    first, *others = [line for line in "".join(blocks("bash")).splitlines() if "train" in line]
    assert first.endswith("pip install . && accelerate launch scripts/train.py --model resnet18 --method apart")
    assert not any("scripts/" in line for line in others)  # what is installed needs none


def test_every_command_is_shown():
    assert all(commands(name) or f"`{name}`" in README or f"`apart-hf {name}`" in README for name in COMMANDS)


def test_every_train_command_parses():
    found = commands("train")
    assert len(found) == 8
    for arguments in found:
        parse_arguments(arguments)


def test_every_analyse_command_parses(monkeypatch):
    parsed = []
    monkeypatch.setattr(analyse, "_run", parsed.append)
    for arguments in commands("analyse"):
        analyse.main(arguments)
    assert [args.figure for args in parsed] == ["attack", "robustness", "corruptions"]


@pytest.mark.parametrize(
    "module, name", [(push_to_hub, "push"), (pull, "pull"), (pack, "pack"), (validate, "validate")]
)
def test_every_command_of_a_model_parses(module, name, monkeypatch):
    parsed = []
    monkeypatch.setattr(module, "_run", parsed.append)
    for arguments in commands(name):
        module.main(arguments)
    assert len(parsed) == 1


def test_every_table_command_parses(capsys, tmp_path):
    found = commands("reproduce")
    assert len(found) == 4
    for arguments in found:
        reproduce.main([*arguments, "--dry-run", "--results", str(tmp_path)])
    assert capsys.readouterr().out.count("apart-hf train --recipe cifar100-wrn40-apart ") == 1 + 5 + 5 + 3 * 5


def test_every_flag_exists(capsys):
    for command, *figure in (
        (parse_arguments,),
        (push_to_hub.main,),
        (pull.main,),
        (pack.main,),
        (reproduce.main,),
        (validate.main,),
        (analyse.main, "attack"),
        (analyse.main, "robustness"),
        (analyse.main, "corruptions"),
    ):
        with pytest.raises(SystemExit):
            command([*figure, "--help"])
    flags = capsys.readouterr().out
    prose = re.sub(r"```.*?```|`python [^`]*`", "", README, flags=re.S)  # other programs have flags of their own
    assert all(flag in flags for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose))


def test_the_table_of_methods():
    rows = dict(re.findall(r"^\| `([a-z][a-z-]*)` \|[^|]*\|([^|]*)\|[^|]*\|$", README, re.M))
    assert rows.keys() == METHODS.keys()
    for name, cell in rows.items():
        documented = dict(re.findall(r"`(\w+)` \(([\w.]+)\)", cell))
        values = {k: v for k, v in METHODS[name].hyper_parameters().items() if not isinstance(v, bool)}
        assert documented == {k: v if isinstance(v, str) else f"{v:g}" for k, v in values.items()}


def test_every_recipe_is_described():
    stems = re.findall(r"`((?:cifar|tiny|imagenet)[a-z0-9-]*-(?:wrn40|preact18|resnet18))`", README)
    assert {name.rsplit(method, 1)[0] for name, method in ((n, f"-{s['method']}") for n, s in RECIPES.items())} == set(
        stems
    )


def test_every_dataset_is_named():
    assert all(f"`{name}`" in README for name in DATASETS)
