"""The released models: their cards are what the folders say, their claims hold, and they load without a connection."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from apart_hf import list_pretrained, load_pretrained
from apart_hf.cli.validate import main as validate_command
from apart_hf.hub.card import FIRST, LAST, make_card
from apart_hf.hub.model_folder import model_cards_folder
from apart_hf.strategies.methods import METHODS
from tests.support.helpers import ROOT

FOLDER = ROOT / "model_cards"


def test_they_are_found():
    assert model_cards_folder() == FOLDER and len(list_pretrained()) >= 2
    assert {path.name for path in FOLDER.iterdir()} == {*list_pretrained(), "card.md"}
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 5_000_000


@pytest.mark.parametrize("name", list_pretrained())
def test_a_card_is_what_its_folder_says(name):
    """A snapshot: the committed card is what the template makes of the committed folder today."""
    text = (FOLDER / name / "README.md").read_text()
    assert make_card(FOLDER / name, f"apart-hf/{name}").content.strip() == text.strip()
    assert text.count(FIRST) == text.count(LAST) == 1
    last = json.loads((FOLDER / name / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| test | {last['top1']:.2f} | {last['top5']:.2f} | {last['eval_loss']:.4f} |" in text
    data = ModelCard(text).data
    assert [result.metric_value for result in data.eval_results] == [last["top1"], last["top5"]]
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "timm" and header["license"] and header["datasets"] and header["model-index"]
    training = json.loads((FOLDER / name / "config.json").read_text())["apart"]
    assert training["method"] in METHODS and re.fullmatch("[0-9a-f]{40}", training["commit"])


@pytest.mark.parametrize("name", list_pretrained())
def test_a_claim_is_measured_again(name, capsys):
    validate_command(["--checkpoint", name, "--dataset", "demo"])
    assert "it holds" in capsys.readouterr().out


@pytest.mark.parametrize("name", list_pretrained())
def test_a_model_loads_offline(name):
    model, transform = load_pretrained(name)
    assert not model.training and model.num_classes == 10 and transform is not None
