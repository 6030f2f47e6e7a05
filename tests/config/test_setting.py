"""Every setting carries its facts, and they agree with its type, with the command line, and with one another."""

import dataclasses
import json
import re
import typing

import pytest

from apart_hf import ApartError
from apart_hf.config.arguments import parse_arguments
from apart_hf.config.setting import OnResume, Range, Role, setting, settings_of
from apart_hf.config.train_config import HYPER_PARAMETERS, SETTINGS, TrainConfig
from apart_hf.strategies.methods import METHODS
from tests.support.helpers import ROOT

HINTS = typing.get_type_hints(TrainConfig)
GROUPS = ("settings", "model", "method", "data", "augmentation", "optimisation", "schedule", "publishing", "run")
every_setting = pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig)])


def said_of_methods(text):
    """(methods before the colon, {method: default in brackets}, default of all others) of a help text."""
    names, found = re.match(r"((?:[a-z-]+(?:, )?)+): ", text), re.search(r"\[(.*)\]$", text)
    own, others = {}, None
    for part in found[1].split("; ") if found else []:
        methods, _, value = part.rpartition(": ")
        own |= dict.fromkeys(methods.split(", ") if methods else [], value)
        others = others if methods else value
    return set(names[1].split(", ")) if names else None, own, others


@pytest.mark.parametrize("name", [name for name in HYPER_PARAMETERS if name != "layer"])
def test_help_texts_of_hyper_parameters_are_those_of_the_methods(name):
    defaults = {key: m.hyper_parameters()[name] for key, m in METHODS.items() if name in m.hyper_parameters()}
    named, own, others = said_of_methods(SETTINGS[name].help)
    assert named in (None, set(defaults))
    for method, default in defaults.items():
        if default is not False:
            assert float(own.get(method, others)) == default, method
    assert METHODS.keys() & set(own) <= set(defaults)


@every_setting
def test_every_field_says_what_it_is_for(name):
    known = SETTINGS[name]
    assert known.name == name and known.default == TrainConfig.__dataclass_fields__[name].default
    assert known.role in typing.get_args(Role) and known.on_resume in typing.get_args(OnResume)
    assert known.group in GROUPS and known.help.strip() == known.help != ""
    if known.role == "command":
        assert known.on_resume == "free" and not known.in_tables and known.recorded is None
    if known.role == "what":
        assert known.on_resume != "free"  # a run that goes on with another value is another run
    if known.role == "where":
        assert known.on_resume == "free" and known.recorded is None  # nothing of a machine's folders is published


def test_every_number_has_a_range_but_few():
    """These are checked elsewhere: by the method, against the data, and by the form of the whole list."""
    without = {known.name for known in SETTINGS.values() if known.kind in (int, float) and known.range is None}
    of_methods = {"epsilon", "groups", "rho", "eta", "alpha", "gamma", "step_size"}
    assert without == of_methods | {"num_classes", "input_size"}


@pytest.mark.parametrize("name", [known.name for known in SETTINGS.values() if known.range is not None])
def test_ranges_are_of_numbers_and_hold_the_default(name):
    known = SETTINGS[name]
    bounds = known.range
    assert known.kind in (int, float)
    assert None in (bounds.least, bounds.above) and None in (bounds.most, bounds.below)
    lower = [bound for bound in (bounds.least, bounds.above) if bound is not None]
    upper = [bound for bound in (bounds.most, bounds.below) if bound is not None]
    assert not lower or not upper or lower[0] < upper[0]
    if known.kind is int:
        assert all(isinstance(bound, int) for bound in lower + upper)
    if known.default is not None:
        assert bounds.problem(known.default) is None
    for wrong in [float("nan"), float("inf"), *(bound - 1 for bound in lower), *(bound + 1 for bound in upper)]:
        value = [wrong] * (known.length or 1) if known.many else wrong
        with pytest.raises(ApartError, match=rf"^({known.flag} |{name}=)"):
            TrainConfig(**{name: value})


@every_setting
def test_the_command_line_takes_what_the_type_says(name):
    known, hint = SETTINGS[name], HINTS[name]
    inner = [one for one in typing.get_args(hint) if one is not type(None)] or [hint]
    if typing.get_origin(hint) is typing.Literal:
        inner = [hint]
    literal = typing.get_args(inner[0]) if typing.get_origin(inner[0]) is typing.Literal else ()
    assert known.choices == literal and known.many == (typing.get_origin(inner[0]) is list)
    for choice in literal:
        assert getattr(parse_arguments([known.flag, choice]), name) == choice
    if literal:
        assert known.default is None or known.default in literal
        with pytest.raises(SystemExit):
            parse_arguments([known.flag, "none of them"])
    elif known.kind is bool:
        assert known.default in (False, None) and getattr(parse_arguments([known.flag]), name) is True
    for flag in known.flags:
        assert getattr(parse_arguments([flag, "1"]), name) == 1


@pytest.mark.parametrize(
    "bounds, fits, fails",
    [
        (Range(least=1), (1, 1.5, 2**31 - 1), (0, 0.9, 2**31, float("inf"), float("nan"))),
        (Range(least=0, most=256), (0, 256), (-1, 257)),
        (Range(least=0, most=2**32 - 2), (2**32 - 2,), (2**32 - 1,)),
        (Range(least=0, below=1), (0, 0.999), (1, 1.0, -0.1)),
        (Range(above=0), (1e-30, 2**40), (0, -1, float("inf"), float("nan"))),
        (Range(above=0, most=1), (0.1, 1), (0, 1.1)),
        (Range(), (-1e30, 0), (float("inf"), -float("inf"), float("nan"))),
    ],
)
def test_a_range_knows_its_bounds(bounds, fits, fails):
    assert [bounds.problem(value) for value in fits] == [None] * len(fits)
    assert all(bounds.problem(value) for value in fails)


def test_a_field_without_facts_is_refused():
    with pytest.raises(TypeError, match="role"):
        setting(1, "help", group="run")

    @dataclasses.dataclass(frozen=True)
    class Bare(TrainConfig):
        new: int = 1

    with pytest.raises(TypeError, match=r"Bare\.new has no facts"):
        settings_of(Bare)

    @dataclasses.dataclass(frozen=True)
    class Odd(TrainConfig):
        new: dict = setting(None, "help", group="run", role="how")

    with pytest.raises(TypeError, match=r"Odd\.new: .*dict.* is no type that a flag can have"):
        settings_of(Odd)


def test_a_new_field_is_one_edit():
    @dataclasses.dataclass(frozen=True)
    class More(TrainConfig):
        new: int | None = setting(None, "help", group="run", role="what", least=2)

    found = settings_of(More)["new"]
    assert (found.flag, found.kind, found.on_resume, found.in_tables) == ("--new", int, "override", True)
    with pytest.raises(ApartError, match=r"^--new 1: must be a finite number of at least 2\.$"):
        More(new=1)


def test_a_table_s_rows_decide_the_method():
    of_method = {known.name for known in SETTINGS.values() if known.group == "method"}
    assert of_method == {"method", "every", "perturb_from_epoch", *HYPER_PARAMETERS}
    assert not any(SETTINGS[name].in_tables for name in of_method)


def test_the_record_keeps_its_order():
    places = [known.recorded for known in SETTINGS.values() if known.recorded is not None]
    assert sorted(places) == list(range(1, len(places) + 1))
    cards = sorted(ROOT.glob("model_cards/*/config.json"))
    assert cards
    for card in cards:
        keys = [key for key in json.loads(card.read_text())["apart"]["settings"] if key in SETTINGS]
        assert keys == sorted(keys, key=lambda key: SETTINGS[key].recorded)


def test_what_is_idle_without_another_setting_names_one_that_is_off():
    pairs = {known.name: known.idle_without for known in SETTINGS.values() if known.idle_without is not None}
    assert pairs == {"lr_base_size": "lr_base", "lr_base_scale": "lr_base"}
    assert all(SETTINGS[other].default is None for other in pairs.values())


def test_what_decides_another_setting_names_one():
    pairs = {known.name: known.decides for known in SETTINGS.values() if known.decides is not None}
    assert pairs and set(pairs.values()) <= set(SETTINGS)
    assert pairs["img_size"] == "input_size" and pairs["input_size"] == "img_size"
