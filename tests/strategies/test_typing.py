"""A type checker finds misspelt methods and hyper-parameters in a user's script."""

import inspect
import re
from pathlib import Path
from typing import get_args, get_overloads, get_type_hints

import pytest
from mypy import api

from apart_hf import create_loss, create_strategy, list_strategies
from apart_hf.strategies.hyper_parameters import LossOptions, MethodName, Standard
from apart_hf.strategies.methods import METHODS

ROOT = Path(__file__).parents[2]
GOOD = """
import timm
import torch
from apart_hf import Perturbation, create_loss, create_strategy, list_strategies


class Own(Perturbation):
    pass


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
create_strategy("advprop", model, pixel_epsilon=4, pixel_step=1, steps=5, random_start=True, aux_affine=True, ratio=0.5)
create_strategy("fast-advprop", model, pixel_epsilon=1.0, mean=[0.5], std=(0.5, 0.5, 0.5))
create_strategy("advprop", model, mean=0.5, std=0.25)
create_strategy("apart-advprop", model, epsilon=0.1, steps=2)
create_strategy("gsam", model, rho=0.1, alpha=0.1)
create_strategy("awp", model, gamma=0.01)
create_strategy("advbn", model, layer="layer2", steps=2, step_size=0.1)
for name in list_strategies():
    strategy = create_strategy(name, model)
create_strategy([Own(model), "apart"], model, keeps_clean_gradient=False, groups=4, every=2)
loss, output = strategy.accumulate_gradients(torch.ones(4, 3, 8, 8), torch.ones(4).long(), torch.nn.CrossEntropyLoss())
print(loss.item(), strategy.passes * 2)
loss, aux = strategy.accumulate({"x": torch.ones(4, 3, 8, 8)}, lambda batch: model(batch["x"]).mean(), samples=4)


def loss_fn(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(batch["x"]).mean()


def with_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    return loss_fn(model, batch), [1]


batch = {"x": torch.ones(4, 3, 8, 8)}
create_loss("apart", model, loss_fn, epsilon=0.1, groups=4, every=2, uneven="fit")(batch).backward()
total, numbers = create_loss("sam", model, with_logits, rho=0.1, generator=torch.Generator())(batch, samples=4)
total.backward()
print(numbers[0] + 1)
for name in list_strategies():
    create_loss(name, model, loss_fn)
create_loss([Own(model)], model, loss_fn, keeps_clean_gradient=False)(batch).backward()
"""
BAD = {
    "misspelt method": 'create_strategy("aprat", model)',
    "misspelt hyper-parameter": 'create_strategy("apart", model, groupz=4)',
    "hyper-parameter of another method": 'create_strategy("sam", model, groups=4)',
    "ratio without a clean gradient": 'create_strategy("asam", model, ratio=0.5)',
    "ghost-bn has no radius": 'create_strategy("ghost-bn", model, epsilon=0.1)',
    "random-bn has no adversary": 'create_strategy("random-bn", model, local_attack=True)',
    "one step has no number of steps": 'create_strategy("fast-advprop", model, steps=2)',
    "steps are whole": 'create_strategy("advprop", model, steps=2.5)',
    "a plain step has none": 'create_strategy("standard", model, epsilon=0.1)',
    "groups are whole": 'create_strategy("apart", model, groups=4.5)',
    "a radius is a number": 'create_strategy("sam", model, rho="0.1")',
    "no model": 'create_strategy("apart", "resnet18")',
    "no such way with uneven batches": 'create_strategy("apart", model, uneven="skip")',
    "every is whole": 'create_strategy("apart", model, every=1.5)',
    "no perturbation": "create_strategy([model], model)",
    "misspelt method in a list": 'create_strategy(["aprat"], model)',
    "a method has its own combination": 'create_strategy("sam", model, keeps_clean_gradient=True)',
    "a loss of no perturbation": "create_loss([model], model, loss_fn)",
    "misspelt method of a loss": 'create_loss("aprat", model, loss_fn)',
    "misspelt hyper-parameter of a loss": 'create_loss("apart", model, loss_fn, groupz=4)',
    "hyper-parameter of another loss": 'create_loss("sam", model, loss_fn, groups=4)',
    "a loss has no accelerator": 'create_loss("apart", model, loss_fn, accelerator=None)',
    "a loss of nothing": 'create_loss("apart", model)',
    "a loss of another batch": 'create_loss("apart", model, loss_fn)([1])',
    "no criterion": 'create_strategy("sam", model).accumulate_gradients(torch.ones(1), torch.ones(1))',
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Lines of the scripts that mypy objects to, with its messages: one run for all, since it reads torch and timm."""
    folder = tmp_path_factory.mktemp("scripts")
    head = (
        "import timm\nimport torch\nfrom apart_hf import create_loss, create_strategy\n"
        'model = timm.create_model("test_resnet")\n'
        "def loss_fn(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor: ...\n"
    )
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
    names = ("create_strategy", "create_loss", "accumulate_gradients", "TwoPassLoss", "List item")
    assert all(any(name in text for name in names) for text in messages)


def by_name(make):
    """The overloads that take a method's name, with their hints: another one takes a list."""
    found = [(one, get_type_hints(one)) for one in get_overloads(make)]
    lists = [one for one, hints in found if "options" not in hints]
    assert len(lists) == 1 and inspect.signature(lists[0]).parameters.keys() > {"name", "keeps_clean_gradient"}
    return [hints for one, hints in found if one not in lists]


MAKERS = pytest.mark.parametrize("make, common", [(create_strategy, Standard), (create_loss, LossOptions)])


@MAKERS
def test_declared_names_are_those_of_the_table(make, common):
    assert list(get_args(MethodName)) == list(METHODS) == list_strategies()
    declared = {}
    for hints in by_name(make):
        (options,) = get_args(hints["options"])
        for name in get_args(hints["name"]):
            assert name not in declared
            declared[name] = set(get_type_hints(options)) - set(get_type_hints(common))
    assert declared == {name: set(method.hyper_parameters()) for name, method in METHODS.items()}


@MAKERS
def test_declared_types_are_those_of_the_defaults(make, common):
    kinds = {}
    for hints in by_name(make):
        (options,) = get_args(hints["options"])
        kinds |= get_type_hints(options)
    for method in METHODS.values():
        for key, default in method.hyper_parameters().items():
            assert type(default) is kinds[key], key


@MAKERS
def test_what_every_method_takes_is_what_the_function_takes(make, common):
    parameters = inspect.signature(make).parameters.values()
    keywords = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keywords == {*get_type_hints(common), "keeps_clean_gradient"}  # the latter is of lists alone
