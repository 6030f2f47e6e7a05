"""Method cards are of methods that exist, have one form, run, and name every hyper-parameter with its default."""

import re

import pytest

from apart_hf.config.arguments import parse_arguments
from apart_hf.strategies.methods import METHODS
from tests.support.helpers import ROOT

CARDS = sorted((ROOT / "docs/methods").glob("*.md"))
HEADINGS = ["How to Use", "Suggested Hyperparameters", "Technical Details", "Attribution"]


def test_every_method_has_a_card():
    assert {card.stem for card in CARDS} == METHODS.keys()


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_the_form_of_a_card(card):
    text = card.read_text()
    assert re.match(rf"# \S.*\n\n`{card.stem}` [^#]*\(\*", text), "a title, and a sentence with the attribution"
    assert re.findall(r"^## (.*)$", text, re.M) == HEADINGS
    assert re.search(r"\]\(https://(arxiv.org/abs/|openreview.net/forum)", text.split("## Attribution")[1])


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_the_hyper_parameters_of_a_card(card):
    (listed,) = re.findall(r"^## Suggested Hyperparameters\n(.*?)^## ", card.read_text(), re.M | re.S)
    for line in re.findall(r"^- .*", listed, re.M):
        assert re.match(r"- `\w+` \([^)]*\)( and `\w+` \([^)]*\))? [a-z]+ ", line), "a sentence, not a label"
    documented = dict(re.findall(r"`(\w+)` \(([\d.]+|off|auto)\)", listed))
    for key, default in METHODS[card.stem].hyper_parameters().items():
        shown = default if isinstance(default, str) else "off" if default is False else f"{default:g}"
        assert documented.pop(key) == shown, key
    assert not documented


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_the_code_of_a_card_runs(card):
    blocks = re.findall(r"```python\n(.*?)```", card.read_text(), re.S)
    assert blocks
    for block in blocks:
        scope = {}
        exec(block, scope)
        assert scope["loss"].isfinite()


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_the_commands_of_a_card_parse(card):
    found = re.findall(r"`apart-hf train ([^`]*)`", card.read_text())
    assert found
    for command in found:
        assert parse_arguments(command.split()).method == card.stem
