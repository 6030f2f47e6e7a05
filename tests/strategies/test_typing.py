"""A type checker finds misspelt methods and hyper-parameters in a user's script."""

import inspect
import re
from pathlib import Path
from typing import get_args, get_overloads, get_type_hints

import pytest
from mypy import api

from apart_hf import create_strategy, list_strategies
from apart_hf.strategies.hyper_parameters import MethodName, Standard
from apart_hf.strategies.methods import METHODS

ROOT = Path(__file__).parents[2]
GOOD = """
import timm
import torch
from apart_hf import create_strategy, list_strategies

model = timm.create_model("test_resnet", num_classes=3)
create_strategy("standard", model)
create_strategy("apart", model, epsilon=0.1, groups=4, ratio=0.5, local_attack=True)
create_strategy("sam", model, rho=1, global_norm=True, generator=torch.Generator())
create_strategy("apart-sam", model, epsilon=0.1, rho=0.2)
create_strategy("asam", model, eta=0.1)
create_strategy("apart-asam", model, eta=0.1, groups=4)
create_strategy("sam-on", model, rho=0.5)
create_strategy("random-bn", model, epsilon=0.1, ratio=0.5)
create_strategy("ghost-bn", model, groups=4)
for name in list_strategies():
    strategy = create_strategy(name, model)
loss, output = strategy.accumulate_gradients(torch.ones(4, 3, 8, 8), torch.ones(4).long(), torch.nn.CrossEntropyLoss())
print(loss.item(), strategy.passes * 2)
"""
BAD = {
    "misspelt method": 'create_strategy("aprat", model)',
    "misspelt hyper-parameter": 'create_strategy("apart", model, groupz=4)',
    "hyper-parameter of another method": 'create_strategy("sam", model, groups=4)',
    "ratio without a clean gradient": 'create_strategy("asam", model, ratio=0.5)',
    "ghost-bn has no radius": 'create_strategy("ghost-bn", model, epsilon=0.1)',
    "random-bn has no adversary": 'create_strategy("random-bn", model, local_attack=True)',
    "a plain step has none": 'create_strategy("standard", model, epsilon=0.1)',
    "groups are whole": 'create_strategy("apart", model, groups=4.5)',
    "a radius is a number": 'create_strategy("sam", model, rho="0.1")',
    "no model": 'create_strategy("apart", "resnet18")',
    "no criterion": 'create_strategy("sam", model).accumulate_gradients(torch.ones(1), torch.ones(1))',
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Lines of the scripts that mypy objects to, with its messages: one run for all, since it reads torch and timm."""
    folder = tmp_path_factory.mktemp("scripts")
    head = 'import timm\nimport torch\nfrom apart_hf import create_strategy\nmodel = timm.create_model("test_resnet")\n'
    (folder / "good.py").write_text(GOOD)
    (folder / "bad.py").write_text(head + "\n".join(BAD.values()) + "\n")
    said, problem, _ = api.run(
        ["--config-file", str(ROOT / "setup.cfg"), "--no-pretty", str(folder / "good.py"), str(folder / "bad.py")]
    )
    assert not problem, problem
    # names alone: mypy's cache may remember the folder of an earlier run
    errors = re.findall(r"^(\S+\.py):(\d+): error: (.*)$", said, re.MULTILINE)
    return [(Path(file).name, int(line) - head.count("\n") - 1, text) for file, line, text in errors]


def test_a_right_script_has_no_type_error(found):
    assert [error for error in found if error[0] != "bad.py"] == []


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_call_is_a_type_error(found, case):
    here = list(BAD).index(case)
    messages = [text for file, line, text in found if file == "bad.py" and line == here]
    assert messages
    assert all("create_strategy" in text or "accumulate_gradients" in text for text in messages)


def test_declared_names_are_those_of_the_table():
    assert list(get_args(MethodName)) == list(METHODS) == list_strategies()
    declared = {}
    for overload in get_overloads(create_strategy):
        hints = get_type_hints(overload)
        (options,) = get_args(hints["options"])
        for name in get_args(hints["name"]):
            assert name not in declared
            declared[name] = set(get_type_hints(options)) - set(get_type_hints(Standard))
    assert declared == {name: set(method.hyper_parameters()) for name, method in METHODS.items()}


def test_declared_types_are_those_of_the_defaults():
    kinds = {}
    for overload in get_overloads(create_strategy):
        (options,) = get_args(get_type_hints(overload)["options"])
        kinds |= get_type_hints(options)
    for method in METHODS.values():
        for key, default in method.hyper_parameters().items():
            assert type(default) is kinds[key], key


def test_what_every_method_takes_is_what_the_function_takes():
    parameters = inspect.signature(create_strategy).parameters.values()
    keywords = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keywords == set(get_type_hints(Standard))
