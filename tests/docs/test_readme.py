"""The README is true and short: its code runs, its commands are read, its table of methods is the code's own."""

import re

import pytest

from apart_hf.__main__ import COMMANDS
from apart_hf.config.recipes import RECIPES
from apart_hf.data import DATASETS
from apart_hf.strategies.methods import METHODS
from tests.support.documents import blocks, commands, known_flags, named_flags, paragraphs, parse
from tests.support.helpers import ROOT

README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"


def test_it_is_short():
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 1700
    assert len(set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))) <= 22
    assert [part for part in paragraphs(README) if len(part.split()) > 80] == []


def test_it_begins_with_what_it_is_and_a_picture():
    first = README.splitlines()[:20]
    assert any("docs/pictures/two-passes.svg" in line for line in first)
    links = re.findall(r"\]\(#([a-z-]+)\)", README)
    titles = {
        re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", README, re.M)
    }
    assert len(links) >= 10 and set(links) <= titles


def test_the_loop_runs():
    (loop,) = blocks(README, "python")
    assert blocks((DOCS / "start/own-loop.md").read_text(), "python") == [loop]
    scope = {}
    exec(loop, scope)
    assert scope["loss"].isfinite() and scope["output"].shape == (32, 10)
    assert len([line for line in loop.splitlines() if line]) <= 13


def test_lines_for_other_trainers_are_those_of_their_pages():
    """Which run them."""
    pages = "".join((DOCS / name).read_text() for name in ("LOOPS.md", "TIMM.md")).splitlines()
    (lines,) = blocks(README, "diff")
    added = [line for line in lines.splitlines() if line.startswith("+")]
    assert len(added) == 7 and [line for line in added if line not in pages] == []


def shown(name):
    return [arguments for command, arguments in commands(README) if command == name]


def test_the_first_command_is_that_of_the_launcher():
    first, *others = [line for line in "".join(blocks(README, "bash")).splitlines() if "train" in line]
    assert first.endswith("pip install . && accelerate launch scripts/train.py --model resnet18 --method apart")
    assert not any("scripts/" in line for line in others)  # what is installed needs none


def test_two_commands_set_up_a_bare_machine():
    """Each makes or finds its environment, installs, and does what it is for."""
    train, tests = [line for line in "".join(blocks(README, "bash")).splitlines() if "pip install" in line]
    assert train.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install . && ")
    assert tests == 'pip install -e ".[test]" && python -m pytest -n 2 --dist loadfile'
    assert f"\n### Tests\n\n```bash\n{tests}\n```\n" in README  # where `.ci/run` reads it


def test_every_command_is_shown():
    assert all(shown(name) or f"`{name}`" in README for name in COMMANDS)


def test_every_command_parses(monkeypatch, tmp_path, capsys):
    found = list(commands(README))
    assert [name for name, _ in found].count("train") == 5 and len(found) == 9
    for name, arguments in found:
        parse(name, arguments, tmp_path, monkeypatch)


def test_every_table_command_parses(monkeypatch, tmp_path, capsys):
    found = [call for page in (README, (DOCS / "paper/tables.md").read_text()) for call in commands(page)]
    for name, arguments in found:
        if name == "reproduce":
            parse(name, arguments, tmp_path, monkeypatch)
    printed = capsys.readouterr().out.count("apart-hf train --recipe cifar100-wrn40-apart ")
    assert printed == 5 + 1 + 5 + 5 + 3 * 5


def test_every_flag_exists():
    assert named_flags(README) - known_flags() == set()


def test_the_table_of_methods():
    rows = dict(re.findall(r"^\| `([a-z][a-z-]*)` \|[^|]*\|([^|]*)\|[^|]*\|$", README, re.M))
    assert rows.keys() == METHODS.keys()
    for name, cell in rows.items():
        documented = dict(re.findall(r"`(\w+)` \(([\w.]+)\)", cell))
        values = {k: v for k, v in METHODS[name].hyper_parameters().items() if not isinstance(v, bool)}
        assert documented == {k: v if isinstance(v, str) else f"{v:g}" for k, v in values.items()}


@pytest.mark.parametrize("page", ["README.md", "docs/guides/choosing.md"])
def test_the_table_of_cases_names_methods(page):
    (table,) = re.findall(r"^\| your case \|.*?\n\n", (ROOT / page).read_text(), re.M | re.S)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()[2:]]
    assert len(rows) >= 6
    for _, methods, settings, _ in rows:
        names = re.findall(r"`([a-z-]+)`", methods)
        assert names and set(names) <= METHODS.keys()
        hyper = {key.replace("_", "-") for name in names for key in METHODS[name].hyper_parameters()}
        hyper |= {"every", "perturb-from-epoch", "rho-min", "pretrained"}
        assert set(re.findall(r"--([a-z-]+)", settings)) <= hyper


def test_every_recipe_is_described():
    page = (DOCS / "paper/recipes.md").read_text().split("<!-- table")[0]
    stems = re.findall(r"`((?:cifar|tiny|imagenet)[a-z0-9-]*-(?:wrn40|preact18|resnet18))`", page)
    assert {name.rsplit(method, 1)[0] for name, method in ((n, f"-{s['method']}") for n, s in RECIPES.items())} == set(
        stems
    )


def test_every_dataset_is_named():
    assert all(f"`{name}`" in (DOCS / "DATA.md").read_text() for name in DATASETS)


def test_figures_of_gain_are_those_of_the_results():
    """The paper's from the table of published accuracies, ours from the study's."""
    from apart_hf.paper.tables import TABLES

    published = TABLES["table1"].parts["cifar100", "wide_resnet40_2"]
    gains = [published["apart"][0] - published[row][0] for row in ("standard", "standard-2x")]
    assert f"| {gains[0]:+.2f} | {gains[1]:+.2f} |" in README
    study = (ROOT / "results/study-cifar100-wide_resnet16_2-small.md").read_text()
    (row,) = [line.split("|") for line in study.splitlines() if line.startswith("| apart |")]
    assert f"| {row[5].strip()} | {row[6].strip()} | {row[7].strip()} |" in README
