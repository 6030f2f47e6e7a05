"""Publishing, by the real client to a Hub on loopback: what arrives, and who loads it."""

import dataclasses
import inspect
import json
import re
import sys

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCard

from apart_hf import ApartError, list_pretrained, load_pretrained, push_to_hub
from apart_hf.cli.push_to_hub import main as push_command
from apart_hf.cli.train import main as train_command
from apart_hf.cli.validate import main as validate_command
from apart_hf.hub.pretrained import find_pretrained
from apart_hf.hub.publish import push
from apart_hf.hub.staging import PushOptions
from tests.support.helpers import PUSHED, REPO, ROOT, arrived, demo_rows, run


def test_one_commit_with_everything_and_nothing_else(hub, quickly, folder):
    url = push(folder, REPO)
    assert arrived(hub) == PUSHED and len(hub.commits(REPO)) == 2 and REPO in url
    tensors = safetensors.torch.load(hub.files(REPO)["model.safetensors"])
    plain = timm.create_model("test_resnet", num_classes=10)
    assert tensors.keys() == plain.state_dict().keys()
    assert not any(re.search("delta|module|orig_mod|ema|momentum_buffer", key) for key in tensors)
    assert str(folder.parent) not in "".join(  # no path of this machine
        content.decode() for name, content in hub.files(REPO).items() if name.endswith(("json", "jsonl", "md"))
    )
    push(folder, REPO)
    assert len(hub.commits(REPO)) == 2  # the same again is no commit


def test_branch_pull_request_message_and_visibility(hub, quickly, folder):
    push(folder, "team/m", PushOptions(private=True, revision="long", commit_message="mine"))
    assert hub.commits("team/m", revision="long")[-1] == "mine" and arrived(hub, "team/m") == set()
    assert arrived(hub, "team/m", revision="long") == PUSHED
    push(folder, "team/m", PushOptions(create_pr=True))
    (reference,) = hub.pull_requests("team/m")
    assert arrived(hub, "team/m") == set() and arrived(hub, "team/m", revision=reference) == PUSHED


LOAD = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
model = timm.create_model(f"hf_hub:{sys.argv[1]}", pretrained=True).eval()
assert "apart_hf" not in sys.modules
torch.set_num_threads(1)
with torch.no_grad():
    save_file({"logits": model(load_file(sys.argv[2])["images"])}, sys.argv[3])
"""


@pytest.mark.process
def test_train_push_load_validate(hub, tmp_path, capsys, drawn):
    """The whole way, by its commands: what the card claims is measured again from the Hub."""
    flags = f"--model test_resnet --max-steps 12 --license mit --push-to-hub {REPO}"
    train_command([*flags.split(), "--output", str(tmp_path)])
    said = capsys.readouterr()
    assert f"pushed: {hub.url}/{REPO}" in said.out and "hf_write" not in said.out + said.err
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    claimed = {r.metric_name: r.metric_value for r in card.data.eval_results}["top-1 accuracy (%)"]
    last = json.loads((tmp_path / "demo-test_resnet-apart/metrics.jsonl").read_text().splitlines()[-1])
    assert claimed == last["top1"] and card.data.license == "mit"
    images = torch.randn(4, 3, 28, 28)
    safetensors.torch.save_file({"images": images}, tmp_path / "images")
    loaded = run(sys.executable, "-c", LOAD, REPO, tmp_path / "images", tmp_path / "logits", HF_HOME=str(tmp_path))
    assert loaded.returncode == 0, loaded.stderr
    model, _ = load_pretrained(str(tmp_path / "demo-test_resnet-apart"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        assert torch.equal(safetensors.torch.load_file(tmp_path / "logits")["logits"], model(images))
    torch.set_num_threads(threads)
    validate_command(["--checkpoint", REPO, "--dataset", "demo", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["top1"] == pytest.approx(claimed, abs=1e-6) and found["holds"]
    assert found["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


@pytest.mark.process
def test_every_released_model(hub, capsys):
    before = {file: file.read_bytes() for file in (ROOT / "model_cards").rglob("*") if file.is_file()}
    push_command(["--all", str(ROOT / "model_cards")])
    said = capsys.readouterr().out
    for name in list_pretrained():
        assert f"user/{name}: {hub.url}/user/{name}/commit/" in said
        assert f'timm.create_model("hf_hub:user/{name}"' in hub.files(f"user/{name}")["README.md"].decode()
        assert len(hub.commits(f"user/{name}")) == 2 and load_pretrained(f"user/{name}")[0].num_classes == 10
    assert before == {file: file.read_bytes() for file in (ROOT / "model_cards").rglob("*") if file.is_file()}


def test_a_claim_that_does_not_hold(folder, tmp_path, capsys):
    (tmp_path / "data").mkdir()  # the name of the training's folder
    demo_rows("test").select(range(60)).to_parquet(str(tmp_path / "data/test.parquet"))
    command = ["--checkpoint", str(folder), "--data-dir", str(tmp_path / "data"), "--val-split", "test"]
    validate_command(command)
    assert "it holds (difference +0.00)" in capsys.readouterr().out
    config = json.loads((folder / "last/config.json").read_text())
    config["apart"]["results"]["top1"] += 1
    (folder / "last/config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stop:
        validate_command(command)
    assert stop.value.code == 1 and "it does NOT hold (difference -1.00)" in capsys.readouterr().out
    (tmp_path / "data").rename(tmp_path / "others")
    validate_command([*command[:3], str(tmp_path / "others"), *command[4:]])  # other images: nothing to compare with
    assert "claimed: for other images: 60 of split 'test'" in capsys.readouterr().out


def test_damage_on_the_way_is_found(hub, quickly, folder):
    push(folder, "user/fragile")
    good = load_pretrained("user/fragile")[0].state_dict()
    cached = find_pretrained("user/fragile") / "model.safetensors"
    content = bytearray(cached.read_bytes())
    content[-5] ^= 1
    cached.write_bytes(content)  # the cache alone is damaged: fetched again
    assert all(torch.equal(value, good[key]) for key, value in load_pretrained("user/fragile")[0].state_dict().items())
    hub.corrupt("user/fragile", "model.safetensors")
    cached.write_bytes(content)
    timm.create_model("hf_hub:user/fragile", pretrained=True)  # timm does not notice
    with pytest.raises(ApartError, match="is damaged: its sha256 is not"):
        load_pretrained("user/fragile")


def test_another_revision(hub, quickly, folder):
    push(folder, REPO)
    first = hub.files(REPO)
    (folder / "last/model.safetensors").unlink()
    with pytest.raises(ApartError, match=r"has no model\.safetensors; pickled weights"):
        push(folder, REPO)
    hub.put(REPO, {"config.json": b"{}"}, revision="broken")
    with pytest.raises(ApartError, match="is no exported model"):
        load_pretrained(REPO, revision="broken")
    assert hub.files(REPO) == first and load_pretrained(REPO, revision="main")[0].num_classes == 10


def test_the_public_function_takes_every_option():
    """The keywords of `push_to_hub` are the fields of the options, with the same defaults."""
    keywords = [p for p in inspect.signature(push_to_hub).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert {p.name: p.default for p in keywords} == {f.name: f.default for f in dataclasses.fields(PushOptions)}
