"""What the documents name is there: rooms, modules, names within them, tests, scripts; and the version is one."""

import configparser
import importlib
import re

import pytest
import timm
import yaml

import apart_hf
from tests.support.helpers import ROOT

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "model_cards/card.md",
    ROOT / "apart_hf/batchnorm/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PACKAGE = ROOT / "apart_hf"
TESTS = {
    name
    for file in (ROOT / "tests").rglob("test_*.py")
    for name in [file.stem, *re.findall(r"^def (test_\w+)", file.read_text(), re.M)]
}


def section(file, title):
    (text,) = re.findall(rf"^#+ {title}\n(.*?)(?=^#+ |\Z)", (ROOT / file).read_text(), re.M | re.S)
    return text


def checked_text(document):
    """All of it, but for the old names in the changelog."""
    old = r"^\| `[^|]*\||`[^`]+`(?= is now)" if document.name == "CHANGELOG.md" else r"(?!)"
    return re.sub(old, "", document.read_text(), flags=re.M)


def exists(dotted):
    """A module of the package, or a name in one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        try:
            for name in parts[count:]:
                found = getattr(found, name)
        except AttributeError:
            return False
        return True
    return False


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_is_there(document):
    text = checked_text(document)
    paths = re.findall(r"(?<![\w/.-])(?:apart_hf|tests|scripts|docs|examples|model_cards|results)/[\w./-]*\w", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text)
    folder = ROOT / "model_cards/demo-test_resnet-apart" if document.name == "card.md" else document.parent
    assert [link for link in links if not (folder / link).exists()] == []
    dotted = re.findall(r"(?<![\w/.-])apart_hf(?:\.\w+)+", text)
    assert [name for name in dotted if not exists(name)] == []
    programs = re.findall(r"-m (tests\.\w+)", text)
    assert [name for name in programs if not (ROOT / f"{name.replace('.', '/')}.py").exists()] == []
    named = {name for quoted in re.findall(r"`[^`\n]+`", text) for name in re.findall(r"(?<![\w/.-])test_\w+", quoted)}
    assert named - TESTS - set(timm.list_models()) == set()


def test_what_a_document_names_can_be_missing():
    assert (
        not exists("apart_hf.perturbed_bn")
        and not exists("apart_hf.strategies.methods.create")
        and exists("apart_hf.data.Loaders")
    )


def test_the_rooms_of_the_page():
    rows = re.findall(r"^\| `(\w+)/` \|[^|]*\|([^|]*)\|$", section("docs/ARCHITECTURE.md", "Where things are"), re.M)
    rooms = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}
    assert {room for room, _ in rows} == rooms and len(rows) == len(rooms)
    for room, start in rows:
        assert [name for name in re.findall(r"`([^`]+)`", start) if not (PACKAGE / room / name).exists()] == []
    modules = {file.name for file in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert all(f"`{name}`" in section("docs/ARCHITECTURE.md", "Where things are") for name in modules)


def test_setup_knows_every_room():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = {f"apart_hf.{folder.name}" for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}
    assert set(setup["options"]["packages"].split()) == {"apart_hf", "apart_hf.model_cards", *packages}
    assert "Operating System :: POSIX" in setup["metadata"]["classifiers"].splitlines()


def test_the_new_place_of_every_module():
    new = re.findall(r"^\| `[^|]*\|([^|]*)\|$", section("CHANGELOG.md", "Where each module is now"), re.M)
    modules = {name for cell in new for name in re.findall(r"`([\w/]+\.py)`", cell)}
    assert len(new) == 66 and [name for name in sorted(modules) if not (PACKAGE / name).exists()] == []


def test_the_version_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[([\d.]+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert citation["version"] == newest[1] == apart_hf.__version__
    assert str(citation["date-released"]) == newest[2]


def test_the_example_of_batchnorm_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (PACKAGE / "batchnorm/README.md").read_text(), re.S)
    scope = {}
    exec(example, scope)
    assert all("forward" not in layer.__dict__ for layer in scope["layers"].values())
    assert all(p.grad.isfinite().all() for p in scope["model"].parameters())


@pytest.mark.parametrize("document", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.name)
def test_commands_are_named_rather_than_files_that_a_wheel_lacks(document):
    """Whoever has installed the package has `apart-hf`; the measurements in scripts/ are run from a checkout."""
    doors = "|".join(file.stem for file in (ROOT / "scripts").glob("*.py") if "apart_hf.cli." in file.read_text())
    assert set(doors.split("|")) == {"train", "validate", "push_to_hub", "reproduce", "analyse"}
    assert re.findall(rf"scripts/(?:{doors})\.py", document.read_text()) == []
