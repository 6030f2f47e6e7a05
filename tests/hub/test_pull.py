"""Fetching models into folders of one's own, from the package and from a Hub on loopback."""

import json

import pytest
import timm
import torch

from apart_hf import ApartError, list_pretrained, load_pretrained
from apart_hf.cli.pull import main as pull_command
from apart_hf.hub.publish import push
from apart_hf.hub.pull import pull
from tests.support.helpers import PUSHED, REPO, ROOT


def files(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", list_pretrained())
def test_a_released_model(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pull_command([name])
    assert f"local-dir:{name}" in capsys.readouterr().out
    assert files(tmp_path) == {f"{name}/{file}" for file in files(ROOT / "model_cards" / name)}
    for file in files(tmp_path / name):
        assert (tmp_path / name / file).read_bytes() == (ROOT / "model_cards" / name / file).read_bytes()
    images = torch.randn(2, *load_pretrained(name)[0].pretrained_cfg["input_size"])
    again = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
    assert torch.equal(again(images), load_pretrained(name)[0](images))


def test_a_repository_with_all_that_was_pushed(hub, quickly, folder, tmp_path, monkeypatch):
    push(folder, REPO)
    target = pull(REPO, tmp_path / "new" / "mine")
    assert files(target) == PUSHED and files(tmp_path / "new") == {f"mine/{name}" for name in PUSHED}
    assert {name: (target / name).read_bytes() for name in PUSHED} == {n: hub.files(REPO)[n] for n in PUSHED}
    hub.put(REPO, {"notes.txt": b"of others", "README.md": b"later"})
    assert "notes.txt" not in files(pull(REPO, tmp_path / "later"))
    assert (tmp_path / "later/README.md").read_bytes() == b"later"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert files(pull(REPO, tmp_path / "offline")) == PUSHED  # from the cache


def test_another_revision_and_a_folder_in_timm_s_form(hub, tmp_path):
    source = ROOT / "model_cards/demo-test_resnet-apart"
    content = {name: (source / name).read_bytes() for name in ("model.safetensors", "config.json")}
    hub.put("user/plain", content)
    old = hub.put("user/plain", {"README.md": b"old"})
    hub.put("user/plain", {"README.md": b"new"})
    assert files(pull("user/plain", tmp_path / "now")) == {*content, "README.md"}
    assert (pull("user/plain", tmp_path / "then", revision=old) / "README.md").read_bytes() == b"old"


@pytest.mark.parametrize("prefix", ["hf_hub:", "hf-hub:"])
def test_a_name_as_timm_writes_it(prefix, hub):
    source = ROOT / "model_cards/demo-test_resnet-apart"
    content = {name: (source / name).read_bytes() for name in ("model.safetensors", "config.json")}
    first = hub.put("user/timm", content)
    hub.put("user/timm", {"model.safetensors": b"damaged"})
    own = load_pretrained("demo-test_resnet-apart")[0].state_dict()
    found = load_pretrained(f"{prefix}user/timm@{first}")[0].state_dict()
    assert all(torch.equal(value, own[key]) for key, value in found.items())
    with pytest.raises(ApartError, match=r"damaged|no model"):
        load_pretrained(f"{prefix}user/timm")
    with pytest.raises(ApartError, match="unknown pretrained model 'timm'"):
        load_pretrained(f"{prefix}timm")


def test_nothing_is_written_where_it_cannot_be_pulled(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = list_pretrained()[0]
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "user/local").mkdir(parents=True)
    source = ROOT / "model_cards" / name
    config = json.loads((source / "config.json").read_text())
    config["apart"]["sha256"] = 64 * "0"
    weights = (source / "model.safetensors").read_bytes()
    hub.put("user/damaged", {"model.safetensors": weights, "config.json": json.dumps(config).encode()})
    hub.put("user/empty", {"README.md": b""})
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in [
        ((name, tmp_path / "there"), "there exists already"),
        ((name, tmp_path / "file"), "file exists already"),
        ((name, tmp_path / "file/sub"), "cannot write .*file/sub: Not a directory"),
        (("user/local",), "user/local is a folder here"),
        ((name, None, "x"), f"{name} comes with apart_hf and has no revision 'x'; leave the revision out"),
        (("user/damaged",), "is damaged: its sha256 is not"),
        (("user/empty",), "lacks config.json or model.safetensors"),
        (("user/none",), "user/none does not exist"),
        (("demo-test_resnet",), "unknown pretrained model 'demo-test_resnet': did you mean"),
    ]:
        with pytest.raises(ApartError, match=message):
            pull(*arguments[:2], **({"revision": arguments[2]} if arguments[2:] else {}))
        assert sorted(tmp_path.rglob("*")) == before
    hub.fail("README.md", status=500, times=None)
    hub.put("user/cut", {"model.safetensors": weights, "config.json": (source / "config.json").read_bytes()})
    with pytest.raises(ApartError, match="the Hub answered 500"):
        pull("user/cut")
    assert sorted(tmp_path.rglob("*")) == before
