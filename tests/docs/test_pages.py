"""Pages of docs/ are true: their commands are read by the parsers, their code runs, their flags exist."""

import configparser
import re
import runpy
import shutil
from pathlib import Path

import pytest
import timm
import torch

from apart_hf import create_strategy
from apart_hf.config.arguments import parse_arguments
from apart_hf.config.train_config import SETTINGS
from apart_hf.errors import ApartError
from apart_hf.paper.scales import SCALES
from apart_hf.strategies.methods import METHODS
from tests.support.documents import (
    PAGES,
    blocks,
    commands,
    inline_commands,
    known_flags,
    named_flags,
    paragraphs,
    parse,
)
from tests.support.helpers import ROOT

DOCS = ROOT / "docs"
#: whose code other tests run, beside what it does
ELSEWHERE = {"LOOPS.md", "own-loop.md"}
#: what timm, accelerate and others have, which these pages tell apart from ours
OF_OTHERS = {
    "TIMM.md": None,  # tests/config/test_timm_script.py looks at each
    "LOOPS.md": {"--apart_method"},
    "DATA.md": {"--classes"},  # of scripts/folder_speed.py
    "COST.md": {"--kernels", "--count", "--device", "--repeats", "--profile", "--render", "--json", "--torchcompile"},
    "machines.md": {"--num_processes", "--machine_rank"},
}


def name_of(page):
    return page.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page, monkeypatch, tmp_path, capsys):
    for name, arguments in commands(page.read_text()):
        parse(name, arguments, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_within_sentences_parse(page, monkeypatch, tmp_path, capsys):
    for name, arguments in inline_commands(page.read_text()):
        parse(name, arguments, tmp_path, monkeypatch)


def test_commands_are_found():
    found = {name_of(page): [name for name, _ in commands(page.read_text())] for page in PAGES}
    assert found["start/first-run.md"] == ["train"] * 5 + ["list"]
    assert found["guides/machines.md"] == ["train"] * 6 and found["guides/publish.md"] == ["push"]
    assert found["paper/tables.md"] == ["reproduce"] * 4 and found["paper/figures.md"] == ["analyse"] * 2
    assert len([name for names in found.values() for name in names]) >= 30


def test_a_wrong_command_is_told(monkeypatch, tmp_path):
    for text in ("apart-hf train --epoch 3", "apart-hf analyse attack --model x"):
        ((name, arguments),) = commands(f"```bash\n{text}\n```\n")
        with pytest.raises(SystemExit):
            parse(name, arguments, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in ELSEWHERE], ids=name_of)
def test_code_runs(page, monkeypatch, tmp_path, finished):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, Path("output/demo-resnet18-apart"))
    known, scope = dict(METHODS), {}
    try:
        with torch.random.fork_rng():
            for code in blocks(page.read_text(), "python"):
                exec(code, scope)
    finally:
        METHODS.clear()
        METHODS.update(known)


@pytest.fixture(scope="module")
def flags():
    return known_flags()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_exist(page, flags):
    others = OF_OTHERS.get(page.name, set())
    if others is not None:
        assert named_flags(page.read_text()) - flags - others == set()


def tags(text):
    """What a page shows as nothing, since it reads as a tag of HTML: `<g, u>` outside of code."""
    code = r"^```.*?^```|`[^`]*`|<!--.*?-->|<https?://[^>\s]*>"
    return re.findall(r"</?[A-Za-z][^<>]*>", re.sub(code, "", text, flags=re.S | re.M))


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG"))])
def test_nothing_is_read_as_a_tag(page):
    assert tags(page.read_text()) == []


def test_a_tag_is_told():
    assert tags("h - (g - <g, u> u), a <= b, `<img>`\n```text\n<b>\n```\n<!-- table -->") == ["<g, u>"]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "STUDY.md"], ids=name_of)
def test_paragraphs_are_short(page):
    """All but the study's, whose text was registered before it ran."""
    long = {part.split("\n")[0]: len(part.split()) for part in paragraphs(page.read_text()) if len(part.split()) > 80}
    assert long == {}


@pytest.fixture(scope="module")
def tables():
    return runpy.run_path(str(ROOT / "scripts/document_tables.py"))


def test_tables_are_current(tables):
    stale = [name_of(page) for page in PAGES if tables["rendered"](page) != page.read_text()]
    assert stale == [], "run python scripts/document_tables.py"


def test_every_table_has_one_place(tables, tmp_path):
    places = [name for page in PAGES for name in re.findall(r"^<!-- table: (\S+) -->$", page.read_text(), re.M)]
    assert sorted(places) == sorted(tables["TABLES"])
    (tmp_path / "page.md").write_text("<!-- table: option -->\n<!-- table ends -->\n")
    with pytest.raises(ApartError, match="did you mean 'options'"):
        tables["rendered"](tmp_path / "page.md")


def test_every_setting_is_an_option_with_its_default():
    rows = [re.split(r"(?<!\\)\|", line) for line in (DOCS / "guides/options.md").read_text().splitlines()]
    rows = {re.findall(r"`(--[\w-]+)`", row[1])[0]: row for row in rows if len(row) > 3 and "`--" in row[1]}
    assert list(rows) == [setting.flag for setting in SETTINGS.values()]
    shown = {flag: rows[flag][3].strip() for flag in ("--every", "--drop", "--amp", "--epochs", "--sched", "--lr")}
    assert shown["--every"] == "`1`" and shown["--drop"] == "`0.0`" and shown["--amp"] == "off"


def test_a_range_in_a_help_text_is_no_default():
    page = (DOCS / "guides/options.md").read_text()
    assert "of each channel, in [0, 1], or one for all (default: the dataset's" in page


def test_what_is_public_is_said_by_a_verb(tables):
    """Classes do something, and functions are told to."""
    said = re.findall(r"^\| `([\w.]+)` \| (\w+) ", tables["names"](DOCS / "reference/api.md"), re.M)
    assert [name for name, _ in said] == list(tables["PUBLIC"])
    classes = {name: verb for name, verb in said if name.rpartition(".")[2][0].isupper()}
    assert len(classes) > 8 and [name for name, verb in classes.items() if not verb.endswith("s")] == []
    assert not {verb for _, verb in said} & {"This", "Its", "Arguments", "Always"}


def test_a_card_is_linked_from_the_table(tables, tmp_path, monkeypatch):
    monkeypatch.setitem(tables["methods"].__globals__, "ROOT", tmp_path)
    (tmp_path / "docs/methods").mkdir(parents=True)
    (tmp_path / "docs/methods/sam.md").touch()
    table = tables["methods"](tmp_path / "docs/METHODS.md")
    assert "| [`sam`](methods/sam.md) |" in table and "| `apart` |" in table


def test_the_errors_of_the_page_are_those_that_are_raised():
    page = (DOCS / "reference/exit-codes.md").read_text()
    begins = re.findall(r"^\| (`[^|]*`) \|", page, re.M)
    model, frozen = (timm.create_model("test_resnet") for _ in range(2))
    for layer in frozen.modules():
        layer.train(not isinstance(layer, torch.nn.BatchNorm2d))
    batch = torch.randn(16, 3, 32, 32), torch.arange(16), torch.nn.CrossEntropyLoss()
    calls = (
        lambda: create_strategy("apart", model).accumulate_gradients(torch.randn(61, 3, 32, 32), None, None),
        lambda: create_strategy("apart", timm.create_model("test_resnet").eval()).accumulate_gradients(*batch),
        lambda: create_strategy("apart", frozen).accumulate_gradients(*batch),
        lambda: create_strategy("apart", timm.create_model("test_vit")),
        lambda: parse_arguments(["--recipe", "cifar-100"]),
    )
    for begin, call in zip(begins, calls, strict=True):
        with pytest.raises(ApartError) as error:
            call()
        assert any(str(error.value).startswith(one) for one in re.findall(r"`([^`]*)`", begin)), begin


def test_the_scales_of_the_page():
    page = (DOCS / "paper/tables.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == {*SCALES}


def test_the_rooms_stand_in_the_order_of_the_contract():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (shown,) = blocks((DOCS / "ARCHITECTURE.md").read_text(), "text")
    assert ["__main__", *shown.split("\n")[:-1]] == setup["importlinter:contract:rooms"]["layers"].split("\n")[1:]


def test_the_files_of_a_run_are_those_of_the_page(finished):
    text = (DOCS / "reference/run-folder.md").read_text()
    there = {path.name for path in finished.iterdir()} | {path.name for path in (finished / "last").iterdir()}
    assert [name for name in sorted(there) if f"`{name}" not in text and name != "plots"] == []
    assert all(path.stem in text for path in (finished / "plots").iterdir())
