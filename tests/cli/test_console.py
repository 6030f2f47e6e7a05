"""The console command: its names, its help, what it lists, and that all its messages bear its name."""

import configparser
import importlib
import re

import pytest

import apart_hf
from apart_hf.__main__ import COMMANDS, SPELLINGS, main
from apart_hf.config.recipes import RECIPES
from apart_hf.data import DATASETS
from apart_hf.strategies.methods import METHODS
from apart_hf.utils.text_table import text_table
from tests.support.helpers import ROOT


def test_the_installed_command_is_this_one():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, place = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = place.partition(":")
    assert name == "apart-hf" and getattr(importlib.import_module(module), function) is main


def test_help_names_every_command_and_version(capsys):
    main(["--help"])
    said = capsys.readouterr().out
    assert re.findall(r"^  (\w+)  ", said, re.M) == list(COMMANDS)
    assert list(COMMANDS) == ["train", "validate", "push", "pull", "pack", "reproduce", "analyse", "list"]
    main(["--version"])
    assert capsys.readouterr().out == f"apart-hf {apart_hf.__version__}\n"


@pytest.mark.parametrize("name", [*COMMANDS, *SPELLINGS])
def test_every_command_has_help_under_the_name_of_the_program(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: apart-hf {SPELLINGS.get(name, name)} ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name a command: train, validate, "),
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["--model", "resnet18"], "unknown command '--model': "),
        (["train", "--model", "resnet_18"], "unknown model 'resnet_18'"),
        (["train", "--lr", "x"], "argument --lr: invalid float value"),
        (["validate", "--checkpoint", "none"], "unknown pretrained model 'none'"),
        (["push", "."], "name FOLDER and USER/NAME"),
        (["push", "nowhere", "user/name"], "nowhere is no exported model"),
        (["pull", "none"], "unknown pretrained model 'none'"),
        (["pack", "out", "--dataset", "cifar"], "unknown dataset 'cifar'"),
        (["reproduce", "table9"], "argument table: invalid choice: 'table9'"),
        (["reproduce", "table1", "--dry-run", "--", "--foo", "1"], "unrecognized arguments: --foo 1"),
        (["analyse", "attack", "--checkpoint", "none"], "unknown pretrained model 'none'"),
        (["list", "models", "recipe"], "there is no list of 'recipe'"),
    ],
)
def test_bad_input_is_one_line_of_the_command(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    prog = f"apart-hf {arguments[0]}" if arguments and arguments[0] in COMMANDS else "apart-hf"
    assert error.startswith(f"{prog}: error: {message}"), error
    assert not list(tmp_path.iterdir())


def listed(capsys, *kinds):
    main(["list", *kinds])
    return capsys.readouterr().out


def names(table):
    """The first column of the tables, without their heads."""
    return [
        line.split()[0] for line in table.splitlines() if line and not line.endswith(":") and line.split()[0] != "name"
    ]


def test_what_is_listed_is_what_there_is(capsys):
    assert names(listed(capsys, "methods")) == list(METHODS)
    assert names(listed(capsys, "recipes")) == list(RECIPES)
    assert names(listed(capsys, "datasets")) == list(DATASETS)
    assert names(listed(capsys, "models")) == apart_hf.list_pretrained()
    whole = listed(capsys)
    assert names(whole) == [*METHODS, *RECIPES, *DATASETS, *apart_hf.list_pretrained()]
    assert max(map(len, whole.splitlines())) <= 160


def test_the_figures_that_are_listed(capsys):
    rows = {line.split()[0]: line for line in listed(capsys).splitlines() if line}
    assert "epsilon=0.1 groups=16 rho=0.2 ratio=1" in rows["apart-sam"] and rows["apart-sam"].endswith(" 2")
    assert re.search(
        r"wide_resnet40_2 +200 +128 +epsilon=0.1 groups=16 ratio=1 +0.20$", rows["cifar10-wrn40-apart-mixup"]
    )
    assert re.search(r"uoft-cs/cifar100 +100 +50,000 +10,000 +32$", rows["cifar100"])
    results = re.search(r"test_resnet +apart +demo +10 +(\d+\.\d\d) +([\d,]+)$", rows["demo-test_resnet-apart"])
    weights = ROOT / "model_cards/demo-test_resnet-apart/model.safetensors"
    assert float(results[1]) > 50 and int(results[2].replace(",", "")) == weights.stat().st_size


def test_a_table_is_aligned():
    rows = [
        {"name": "a", "count": 5, "share": 0.5, "what": "x"},
        {"name": "bcd", "count": 1234, "share": None, "what": "yz"},
    ]
    assert text_table(rows).splitlines() == [
        "name  count  share  what",
        "a         5   0.50  x",
        "bcd   1,234         yz",
    ]
    assert text_table([]) == ""
