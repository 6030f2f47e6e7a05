"""The tests keep rules of their own: rooms like the package's, nothing shared but by support, no hidden processes."""

import ast
import re
import subprocess
import sys

import pytest

from tests.support.fork_server import Forked
from tests.support.helpers import ROOT

TESTS, PACKAGE = ROOT / "tests", ROOT / "apart_hf"
# how a docstring begins that has no verb of its own
NO_VERB = re.compile(
    r"(An?|All|Also|As|By|Every|For|How|None|Of|One|Only|That|The|This|Those|To|What|When|Where|Whether|Which|Who|With|"
    r"Within|Without)\b"
)


def imported(file):
    """Every module that a file imports, and every name from one."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_no_test_imports_another():
    files = sorted(TESTS.rglob("*.py"))
    assert len(files) > 50
    for file in files:
        for name in imported(file):
            assert not name.startswith("."), (file, name)  # what it is shows in its full name alone
            shared = not any(part.startswith(("test_", "conftest")) for part in name.split("."))
            assert not name.startswith("tests.") or shared, (file, name)


def test_rooms_are_those_of_the_package():
    rooms = {folder.name for folder in TESTS.iterdir() if (folder / "__init__.py").exists()} - {"support", "docs"}
    assert rooms <= {folder.name for folder in (ROOT / "apart_hf").iterdir() if folder.is_dir()}


def test_a_test_without_the_marker_starts_no_python():
    with pytest.raises(pytest.fail.Exception, match="mark it with pytest"):
        subprocess.run([sys.executable, "-c", ""], check=True)
    with pytest.raises(pytest.fail.Exception, match="mark it with pytest"):
        Forked(print)
    subprocess.run(["true"], check=True)  # other programs are free


def docstrings():
    """(where it is, text) of every function and class of the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", node, text


def test_docstrings_have_verbs_and_sections_of_their_own_lines():
    found = list(docstrings())
    assert len(found) > 300
    wrong = []
    for where, node, text in found:
        if isinstance(node, ast.FunctionDef) and (not re.match(r"[A-Z][a-z]+[ ,]", text) or NO_VERB.match(text)):
            wrong.append((where, text.splitlines()[0]))
        if beside := re.search(r"\b(Args|Returns|Raises|Yields|Example): *\S", text):
            wrong.append((where, beside[0]))
    assert not wrong
