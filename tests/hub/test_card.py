"""The card: what it says, and what it keeps of an earlier one."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
from huggingface_hub import ModelCard

from apart_hf import ApartError, load_pretrained
from apart_hf.cli.push_to_hub import main as push_command
from apart_hf.config.train_config import TrainConfig
from apart_hf.hub.card import FIRST, LAST
from apart_hf.hub.publish import push
from apart_hf.hub.staging import PushOptions, published_files, stage
from apart_hf.runs.train import train
from tests.support.helpers import PUSHED, REPO, arrived, demo_rows


def test_our_own_architecture(hub, quickly, tmp_path):
    finished = train(
        TrainConfig(model="wide_resnet16_2", method="standard", batch_size=8, max_steps=1, output=str(tmp_path))
    )
    push(finished, "user/wide")
    card = hub.files("user/wide")["README.md"].decode()
    assert "`import apart_hf` makes `wide_resnet16_2` known to timm" in card and "\nimport apart_hf\n" in card
    model, transform = load_pretrained("user/wide")
    assert model(transform(demo_rows("test")[0]["image"].convert("RGB"))[None]).shape == (1, 10)


def test_the_usage_on_the_card_runs(hub, quickly, folder, capsys):
    push(folder, REPO)
    (code,) = re.findall(r"```python\n(.*?)```", hub.files(REPO)["README.md"].decode(), re.S)
    exec(code, {})
    assert capsys.readouterr().out.strip() in load_pretrained(str(folder))[0].pretrained_cfg["label_names"]


def test_a_folder_that_timm_saved(hub, quickly, tmp_path):
    model = timm.create_model("test_efficientnet", num_classes=3)
    timm.models.save_for_hf(model, str(tmp_path / "plain"), safe_serialization=True)
    push(tmp_path / "plain", "user/plain")
    assert arrived(hub, "user/plain") == {"model.safetensors", "config.json", "README.md"}
    card = hub.files("user/plain")["README.md"].decode()
    assert "How it was trained is not recorded" in card and "model-index" not in card and "## Results" not in card
    assert load_pretrained("user/plain")[0].num_classes == 3


def test_what_is_written_in_one_repository_stays_there(hub, quickly, folder):
    push(folder, "user/secret", PushOptions(private=True))
    card = hub.files("user/secret")["README.md"].decode()
    hub.put("user/secret", {"README.md": (card + "\n## Internal\n").encode()})
    push(folder, "user/secret")
    push(folder, "user/public")
    assert b"Internal" in hub.files("user/secret")["README.md"]
    assert b"Internal" not in hub.files("user/public")["README.md"]
    with pytest.raises(ApartError, match="user/public is there already and is public"):
        push(folder, "user/public", PushOptions(private=True))


def test_another_model_in_the_same_repository(hub, quickly, folder, tmp_path):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = json.loads((other / "last/config.json").read_text())
    config["apart"] |= {"base_model": "timm/other", "method": "sam"}
    config["apart"]["data"] |= {"hub_id": "uoft-cs/cifar10", "whole": True}
    (other / "last/config.json").write_text(json.dumps(config))
    push(other, REPO)
    before = ModelCard(hub.files(REPO)["README.md"].decode()).data
    assert before.base_model == "timm/other" and before.datasets == ["uoft-cs/cifar10"] and "sam" in before.tags
    push(folder, REPO)
    after = ModelCard(hub.files(REPO)["README.md"].decode()).data
    assert after.base_model is None and after.datasets is None and "sam" not in after.tags


@pytest.mark.parametrize(
    "text", [b"---\n- a list\n---\nx", b"---\na: [\n---\nx", b"\xff\xfe", f"{LAST} {FIRST}".encode()]
)
def test_a_strange_card_is_kept_or_named(text, hub, quickly, folder):
    push(folder, REPO)
    hub.put(REPO, {"README.md": text})
    try:
        push(folder, REPO)
    except ApartError as error:
        assert "the card that is there cannot be read" in str(error) and "\n" not in str(error)
        assert hub.files(REPO)["README.md"] == text
    else:
        assert text.decode(errors="replace") in hub.files(REPO)["README.md"].decode()


def test_pushing_again_replaces_ours_and_keeps_theirs(hub, quickly, folder):
    push(folder, REPO)
    card = hub.files(REPO)["README.md"].decode()
    card = card.replace("license: apache-2.0", "license: apache-2.0\nthumbnail: mine.png")
    card = card.replace("- apart\n", "- apart\n- mine\n")
    hub.put(REPO, {"README.md": (card + "\n## Thanks\n\nTo my data.\n").encode()})
    config = json.loads((folder / "last/config.json").read_text())
    config["apart"]["results"]["top1"] = 99.0
    (folder / "last/config.json").write_text(json.dumps(config))
    push(folder, REPO)
    text = hub.files(REPO)["README.md"].decode()
    data = ModelCard(text).data.to_dict()
    assert "| test | 99.00 |" in text and text.count("# demo-test_resnet-apart") == 1 and "To my data." in text
    assert data["thumbnail"] == "mine.png" and "mine" in data["tags"]
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 99.0
    hub.put(REPO, {"README.md": b"# All mine\n\nwords"})
    push(folder, REPO)
    text = hub.files(REPO)["README.md"].decode()
    assert "# All mine\n\nwords" in text and "| test | 99.00 |" in text


def test_a_card_that_cannot_be_read_is_not_overwritten(hub, quickly, folder):
    """Where the card that is there is out of reach, its hand-written parts would be lost."""
    push(folder, REPO)
    hub.put(REPO, {"README.md": b"# All mine"})
    hub.fail("/resolve/", cut=True, times=None)
    with pytest.raises(ApartError, match="the Hub gave no answer"):
        push(folder, REPO)
    assert hub.files(REPO)["README.md"] == b"# All mine"
    with pytest.raises(ApartError, match="the Hub gave no answer"):
        load_pretrained(REPO)


def test_comparison_with_another_run(folder, tmp_path):
    other = Path(shutil.copytree(folder, tmp_path / "standard"))
    config = json.loads((other / "last/config.json").read_text())
    config["apart"] |= {"method": "standard", "passes": 1, "results": config["apart"]["results"] | {"top1": 10.0}}
    (other / "last/config.json").write_text(json.dumps(config))
    staged = stage(folder, REPO, PushOptions(compare_with=other))
    top1 = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["top1"]
    text = (staged / "README.md").read_text()
    assert f"| standard | 1 | 2 | 10.00 |  |\n| apart | 2 | 2 | {top1:.2f} | {top1 - 10:+.2f} |" in text
    config["architecture"] = "resnet18"
    (other / "last/config.json").write_text(json.dumps(config))
    with pytest.raises(ApartError, match="are of the networks 'test_resnet' and 'resnet18'"):
        stage(folder, REPO, PushOptions(compare_with=other))


def by_class(folder):
    """The rows of the card's table, the card, and what is published of the plots."""
    staged = stage(folder, REPO)
    text = (staged / "README.md").read_text()
    table = re.search(r"^\| class \| images \| top-1 \(%\) \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", text, re.M)
    return (
        table and table[1].splitlines(),
        text,
        {name for name in published_files(staged) if name.startswith("plots/")},
    )


def test_the_card_has_accuracy_by_class_where_there_are_few(folder):
    written = json.loads((folder / "plots/classes.json").read_text())
    rows, text, plots = by_class(folder)
    want = [(one["class"], one["images"], one["accuracy"]) for one in written["classes"]]
    assert len(want) == 10 and sum(images for _, images, _ in want) == 60
    assert rows == [f"| {name} | {images} | {'' if top1 is None else f'{top1:.2f}'} |" for name, images, top1 in want]
    assert "](plots/confusion.png)" in text
    assert plots == {"plots/training.png", "plots/classes.json", "plots/confusion.png"}
    written["classes"][0] |= {"class": "a | b\n\\c", "accuracy": None}
    (folder / "plots/classes.json").write_text(json.dumps(written))
    assert by_class(folder)[0][0] == f"| a \\| b \\\\c | {want[0][1]} |  |"


@pytest.mark.parametrize("change", [{"epoch": 1}, {"split": "other"}, {"images": 59}, {"classes": []}, {"classes": 3}])
def test_numbers_of_other_weights_are_not_on_the_card(change, folder):
    written = json.loads((folder / "plots/classes.json").read_text())
    (folder / "plots/classes.json").write_text(json.dumps(written | change))
    rows, text, _ = by_class(folder)
    assert rows is None and "By class" not in text


def test_many_classes_are_not_on_the_card_and_what_has_gone_is_not_published(folder):
    by_class(folder)
    written = json.loads((folder / "plots/classes.json").read_text())
    (folder / "plots/classes.json").write_text(json.dumps(written | {"classes": 3 * written["classes"]}))
    assert by_class(folder)[0] is None
    (folder / "plots/confusion.png").unlink()
    assert by_class(folder)[2] == {"plots/training.png", "plots/classes.json"}


def test_a_dry_run_reaches_nobody(folder, capsys):
    push_command([str(folder), REPO, "--dry-run", "--license", "mit"])
    said = capsys.readouterr().out
    assert all(f"  {name}  " in said for name in PUSHED)
    assert "license: mit" in (folder / "hub/README.md").read_text()
