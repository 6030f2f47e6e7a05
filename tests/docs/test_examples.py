"""Every example of a public docstring runs, and says what it gives."""

import doctest
import inspect
import re
import shutil

import pytest
import torch

import apart_hf
from apart_hf import METHODS, Method, Perturbation, TwoPassLoss, TwoPassStrategy
from apart_hf.integrations.lightning import Apart
from apart_hf.integrations.timm import apart
from apart_hf.integrations.transformers import ApartMixin, ApartTrainer, ApartTrainingArguments
from apart_hf.strategies.state import StrategyState

CLASSES = (Method, Perturbation, StrategyState, TwoPassLoss, TwoPassStrategy)
INTEGRATIONS = (Apart, ApartMixin, ApartTrainer, ApartTrainingArguments, apart)
NOT_CALLED = {"METHODS", "MethodName", "__version__"}  # a table, a type and a string, shown in the examples of others
SECTIONS = re.compile(r"^\s*(Args|Returns|Raises|Attributes|Example|Examples):", re.MULTILINE)


def public():
    """Names and objects that users call: what the package exports, with the public methods of what they make."""
    found = {name: getattr(apart_hf, name) for name in apart_hf.__all__ if name not in NOT_CALLED}
    found |= {f"{value.__module__}.{value.__name__}": value for value in INTEGRATIONS}
    for kind in (Apart, ApartMixin):  # their other methods are hooks of the framework's
        found |= {
            f"{kind.__module__}.{kind.__name__}.{name}": vars(kind)[name] for name in ("strategy", "count_samples")
        }
    for kind in CLASSES:
        methods = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
        found |= {
            f"{kind.__name__}.{name}": value
            for name, value in methods.items()
            if inspect.isfunction(value) or isinstance(value, property)
        }
    return found


PUBLIC = public()


@pytest.fixture
def place(tmp_path, monkeypatch, finished, hub, quickly):
    """A folder to run in, with a finished run of the name that examples use, and a Hub that answers."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "output" / "my-run")
    return tmp_path


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name, place):
    text = inspect.getdoc(PUBLIC[name])
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert test.examples
    said = []
    known, random_state = dict(METHODS), torch.get_rng_state()
    try:
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    finally:
        torch.set_rng_state(random_state)
    assert not said, "".join(said)
    assert known == METHODS


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstrings_have_their_sections(name):
    value = PUBLIC[name]
    text = inspect.getdoc(value)
    sections = SECTIONS.findall(text)
    assert len(set(sections)) == len(sections)
    for line in text.splitlines():
        assert not re.match(r"\s*(Args|Returns|Raises|Attributes|Example|Examples):\s*\S", line), line
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        parameters = [p for p in signature.parameters.values() if p.name != "self"]
        assert ("Args" in sections) == bool(parameters)
        described = re.findall(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*): ", text, re.MULTILINE)
        assert {p.name for p in parameters} <= {one.lstrip("*") for names in described for one in names.split(", ")}
        assert ("Returns" in sections) == (signature.return_annotation not in ("None", None))


def test_what_is_exported_is_there():
    for name in apart_hf.__all__:
        assert getattr(apart_hf, name) is not None
    assert set(apart_hf.__all__) <= set(dir(apart_hf))
    with pytest.raises(AttributeError, match="no attribute 'create_strategies'"):
        apart_hf.create_strategies  # noqa: B018
