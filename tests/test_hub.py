"""Publishing, by the real client to a Hub on loopback: what arrives, who loads it, and what happens when it fails."""

import contextlib
import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCard

from apart_hf import ApartError, hub_client, list_pretrained, load_pretrained
from apart_hf.card import FIRST, LAST
from apart_hf.config import TrainConfig
from apart_hf.hub import PushOptions, push, stage
from apart_hf.pretrained import find_pretrained
from apart_hf.push import main as push_command
from apart_hf.train import train
from apart_hf.validate import main as validate_command
from tests.helpers import ROOT, demo_rows, run

FILES = {"model.safetensors", "config.json", "README.md", "metrics.jsonl", "plots/training.png"}
ID = "user/demo-test_resnet-apart"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs on 128 images of the demo set."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "data").mkdir()
    for name, rows in (("train", 128), ("test", 60)):
        demo_rows(name).select(range(rows)).to_parquet(str(folder / f"data/{name}.parquet"))
    return train(TrainConfig(
        model="test_resnet", data_dir=str(folder / "data"), batch_size=32, groups=4, epochs=2, lr=0.02,
        license="apache-2.0", output=str(folder), experiment="run",
    ))


@pytest.fixture
def folder(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(hub_client, "FIRST_WAIT", 0.01)


@pytest.fixture
def quickly(monkeypatch):
    """Without the fresh process of `verify`, which takes seconds; other tests go through it."""
    monkeypatch.setattr("apart_hf.hub.verify", lambda staged: None)


def arrived(hub, repo_id=ID, **more):
    return {name for name in hub.files(repo_id, **more) if name != ".gitattributes"}


def test_one_commit_with_everything_and_nothing_else(hub, folder):
    url = push(folder, ID)
    assert arrived(hub) == FILES and len(hub.commits(ID)) == 2 and ID in url
    tensors = safetensors.torch.load(hub.files(ID)["model.safetensors"])
    plain = timm.create_model("test_resnet", num_classes=10)
    assert tensors.keys() == plain.state_dict().keys()
    assert not any(re.search("delta|module|orig_mod|ema|momentum_buffer", key) for key in tensors)
    assert str(folder.parent) not in "".join(  # no path of this machine
        content.decode() for name, content in hub.files(ID).items() if name.endswith(("json", "jsonl", "md")))
    push(folder, ID)
    assert len(hub.commits(ID)) == 2  # the same again is no commit


def test_branch_pull_request_message_and_visibility(hub, quickly, folder):
    push(folder, "team/m", PushOptions(private=True, revision="long", commit_message="mine"))
    assert hub.commits("team/m", revision="long")[-1] == "mine" and arrived(hub, "team/m") == set()
    assert arrived(hub, "team/m", revision="long") == FILES
    push(folder, "team/m", PushOptions(create_pr=True))
    (reference,) = hub.pull_requests("team/m")
    assert arrived(hub, "team/m") == set() and arrived(hub, "team/m", revision=reference) == FILES


LOAD = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
model = timm.create_model(f"hf_hub:{sys.argv[1]}", pretrained=True).eval()
assert "apart_hf" not in sys.modules
torch.set_num_threads(1)
with torch.no_grad():
    save_file({"logits": model(load_file(sys.argv[2])["images"])}, sys.argv[3])
"""


def test_a_process_without_us_gives_the_same_logits(hub, folder, tmp_path):
    push(folder, ID)
    images = torch.randn(4, 3, 28, 28)
    safetensors.torch.save_file({"images": images}, tmp_path / "images")
    result = run(sys.executable, "-c", LOAD, ID, tmp_path / "images", tmp_path / "logits", HF_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    model, _ = load_pretrained(str(folder))
    torch.set_num_threads(1)
    with torch.no_grad():
        assert torch.equal(safetensors.torch.load_file(tmp_path / "logits")["logits"], model(images))


def test_train_push_load_validate(hub, tmp_path, capsys):
    """The whole way, by its commands: what the card claims is measured again from the Hub."""
    result = run(
        sys.executable, ROOT / "scripts/train.py", "--model", "test_resnet", "--max-steps", "12", "--output", tmp_path,
        "--push-to-hub", ID, "--license", "mit",
    )
    assert result.returncode == 0, result.stderr
    assert f"pushed: {hub.url}/{ID}" in result.stdout and "hf_write" not in result.stdout + result.stderr
    card = ModelCard(hub.files(ID)["README.md"].decode())
    claimed = {r.metric_name: r.metric_value for r in card.data.eval_results}["top-1 accuracy (%)"]
    last = json.loads((tmp_path / "demo-test_resnet-apart/metrics.jsonl").read_text().splitlines()[-1])
    assert claimed == last["top1"] and card.data.license == "mit"
    validate_command(["--checkpoint", ID, "--dataset", "demo", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["top1"] == pytest.approx(claimed, abs=1e-6) and found["holds"]
    assert found["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


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
    push(folder, ID)
    first = hub.files(ID)
    (folder / "last/model.safetensors").unlink()
    with pytest.raises(ApartError, match=r"has no model\.safetensors; pickled weights"):
        push(folder, ID)
    hub.put(ID, {"config.json": b"{}"}, revision="broken")
    with pytest.raises(ApartError, match="is no exported model"):
        load_pretrained(ID, revision="broken")
    assert hub.files(ID) == first and load_pretrained(ID, revision="main")[0].num_classes == 10


def test_our_own_architecture(hub, quickly, tmp_path):
    finished = train(TrainConfig(model="wide_resnet16_2", method="standard", batch_size=8, max_steps=1,
                                 output=str(tmp_path)))
    push(finished, "user/wide")
    card = hub.files("user/wide")["README.md"].decode()
    assert "`import apart_hf` makes `wide_resnet16_2` known to timm" in card and "\nimport apart_hf\n" in card
    model, transform = load_pretrained("user/wide")
    assert model(transform(demo_rows("test")[0]["image"].convert("RGB"))[None]).shape == (1, 10)


def test_the_usage_on_the_card_runs(hub, quickly, folder, capsys):
    push(folder, ID)
    (code,) = re.findall(r"```python\n(.*?)```", hub.files(ID)["README.md"].decode(), re.S)
    exec(code, {})
    assert capsys.readouterr().out.strip() in load_pretrained(str(folder))[0].pretrained_cfg["label_names"]


def test_a_folder_that_timm_saved(hub, tmp_path):
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
    push(other, ID)
    before = ModelCard(hub.files(ID)["README.md"].decode()).data
    assert before.base_model == "timm/other" and before.datasets == ["uoft-cs/cifar10"] and "sam" in before.tags
    push(folder, ID)
    after = ModelCard(hub.files(ID)["README.md"].decode()).data
    assert after.base_model is None and after.datasets is None and "sam" not in after.tags


@pytest.mark.parametrize("text", [
    b"---\n- a list\n---\nx", b"---\na: [\n---\nx", b"\xff\xfe", f"{LAST} {FIRST}".encode(),
])
def test_a_strange_card_is_kept_or_named(text, hub, quickly, folder):
    push(folder, ID)
    hub.put(ID, {"README.md": text})
    try:
        push(folder, ID)
    except ApartError as error:
        assert "the card that is there cannot be read" in str(error) and "\n" not in str(error)
        assert hub.files(ID)["README.md"] == text
    else:
        assert text.decode(errors="replace") in hub.files(ID)["README.md"].decode()


def test_pushing_again_replaces_ours_and_keeps_theirs(hub, quickly, folder):
    push(folder, ID)
    card = hub.files(ID)["README.md"].decode()
    card = card.replace("license: apache-2.0", "license: apache-2.0\nthumbnail: mine.png")
    card = card.replace("- apart\n", "- apart\n- mine\n")
    hub.put(ID, {"README.md": (card + "\n## Thanks\n\nTo my data.\n").encode()})
    config = json.loads((folder / "last/config.json").read_text())
    config["apart"]["results"]["top1"] = 99.0
    (folder / "last/config.json").write_text(json.dumps(config))
    push(folder, ID)
    text = hub.files(ID)["README.md"].decode()
    data = ModelCard(text).data.to_dict()
    assert "| test | 99.00 |" in text and text.count("# demo-test_resnet-apart") == 1 and "To my data." in text
    assert data["thumbnail"] == "mine.png" and "mine" in data["tags"]
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 99.0
    hub.put(ID, {"README.md": b"# All mine\n\nwords"})
    push(folder, ID)
    text = hub.files(ID)["README.md"].decode()
    assert "# All mine\n\nwords" in text and "| test | 99.00 |" in text


# -- failures ---------------------------------------------------------------------------------------------------------

ENDPOINTS = ["/api/whoami-v2", "/api/repos/create", "/api/validate-yaml", "/preupload/", "/info/lfs/objects/batch",
             "/lfs/", "/commit/", f"^/api/models/{ID}", "/resolve/"]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("fault", [{"status": 503}, {"cut": True}])
def test_a_passing_fault_anywhere_is_survived(endpoint, fault, hub, quickly, folder):
    if endpoint == "/lfs/" and "cut" in fault:
        pytest.skip("see test_a_cut_upload")
    hub.fail(endpoint, **fault)
    push(folder, ID)
    assert hub.faults_left() == 0 and arrived(hub) == FILES and len(hub.commits(ID)) == 2


@pytest.mark.parametrize("endpoint", ["/api/repos/create", "/commit/"])
def test_it_waits_as_long_as_the_server_asks(endpoint, hub, quickly, folder):
    hub.fail(endpoint, status=429, headers={"Retry-After": "1"})
    start = time.perf_counter()
    push(folder, ID)
    assert time.perf_counter() - start > 1 and arrived(hub) == FILES and len(hub.commits(ID)) == 2


@pytest.mark.parametrize("endpoint", ["/api/repos/create", "/api/validate-yaml", "/commit/"])
def test_a_lasting_fault_ends_in_one_line_and_a_rerun_finishes(endpoint, hub, quickly, folder):
    hub.fail(endpoint, status=500, times=None)
    with pytest.raises(ApartError, match=r"the Hub answered 500 .*run the same command again") as error:
        push(folder, ID)
    assert "\n" not in str(error.value)
    with contextlib.suppress(KeyError):
        assert arrived(hub) == set()
    hub.reset_faults()
    push(folder, ID)
    assert arrived(hub) == FILES and len(hub.commits(ID)) == 2


@pytest.mark.parametrize("fault", [{"cut": True}, {"status": 504}])
def test_a_commit_whose_answer_is_lost_is_not_made_twice(fault, hub, quickly, folder):
    hub.fail("/commit/", **fault, after=True)
    assert push(folder, ID).endswith(f"/{ID}/commit/{_head(hub)}")
    assert len(hub.commits(ID)) == 2 and arrived(hub) == FILES


def _head(hub):
    from huggingface_hub import HfApi
    return HfApi().model_info(ID).sha


def test_a_pull_request_is_not_opened_twice(hub, quickly, folder):
    push(folder, ID)
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() * 2)
    hub.fail("/commit/", cut=True, after=True)
    with pytest.raises(ApartError, match="gave no answer"):
        push(folder, ID, PushOptions(create_pr=True))
    assert len(hub.pull_requests(ID)) == 1


def test_a_card_that_cannot_be_read_is_not_overwritten(hub, quickly, folder):
    """Where the card that is there is out of reach, its hand-written parts would be lost."""
    push(folder, ID)
    hub.put(ID, {"README.md": b"# All mine"})
    hub.fail("/resolve/", cut=True, times=None)
    with pytest.raises(ApartError, match="the Hub gave no answer"):
        push(folder, ID)
    assert hub.files(ID)["README.md"] == b"# All mine"
    with pytest.raises(ApartError, match="the Hub gave no answer"):
        load_pretrained(ID)


def test_an_upload_that_is_refused(hub, quickly, folder):
    hub.fail("/lfs/", status=403, times=None)
    with pytest.raises(ApartError, match="may not write to"):
        push(folder, ID)
    assert arrived(hub) == set()


def test_a_cut_upload(hub, quickly, folder):
    """The client tries five times, which takes a while; then the line, and the rerun."""
    hub.fail("/lfs/", cut=True, cut_after=1000, times=1)
    push(folder, ID)
    assert arrived(hub) == FILES


@pytest.mark.parametrize("token, repo_id, message", [
    ("hf_wrong", ID, "the Hub does not take the token"), ("hf_read", ID, "may not write to"),
    ("hf_write", "someone/m", "may not write to someone/m"), ("", ID, "there is no token for the Hub"),
    ("hf_write", "no/name/at-all", "is no name for a repository"), ("hf_write", "user/bad name", "is no name"),
    ("hf_write", "name", "is no name for a repository"),
])
def test_who_may_push(token, repo_id, message, hub, quickly, folder, monkeypatch, capsys):
    push(folder, ID)
    monkeypatch.setenv("HF_TOKEN", token)
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() * 2)
    with pytest.raises(SystemExit) as stop:
        push_command([str(folder), repo_id])
    said = capsys.readouterr()
    assert stop.value.code == 2 and re.search(message, said.err) and said.err.count("\n") == 1, said.err
    assert not token or token not in said.err + said.out
    assert len(hub.commits(ID)) == 2


def test_a_token_is_refused_before_training(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ApartError, match="does not take the token"):
        train(TrainConfig(model="test_resnet", push_to_hub=ID, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_gated_repository(hub, folder):
    hub.create("someone/gated", gated=True)
    with pytest.raises(ApartError, match="someone/gated is gated and this account has no access"):
        load_pretrained("someone/gated")
    with pytest.raises(ApartError, match="someone/nothing does not exist, or this account may not see it"):
        load_pretrained("someone/nothing")
    hub.put("user/empty", {"a": b""})
    with pytest.raises(ApartError, match=r"user/empty lacks config\.json or model\.safetensors"):
        load_pretrained("user/empty")
    with pytest.raises(ApartError, match="user/empty has no revision 'v9'"):
        load_pretrained("user/empty", revision="v9")


def test_no_hub_and_offline(online, folder, monkeypatch):
    start = time.perf_counter()
    with pytest.raises(ApartError, match="the Hub gave no answer"):  # nobody listens there
        push(folder, ID)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ApartError, match="HF_HUB_OFFLINE is set"):
        push(folder, ID)
    assert time.perf_counter() - start < 10


def test_a_failed_push_after_training_loses_nothing(hub, quickly, tmp_path, capsys):
    from apart_hf.train import main

    hub.fail("/commit/", status=500, times=None)
    with pytest.raises(SystemExit) as stop:
        main(["--model", "test_resnet", "--max-steps", "1", "--output", str(tmp_path), "--push-to-hub", ID])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"python scripts/push_to_hub.py {tmp_path}/demo-test_resnet-apart {ID}" in error
    hub.reset_faults()
    push_command([str(tmp_path / "demo-test_resnet-apart"), ID])
    assert arrived(hub) == FILES


# -- without a Hub ----------------------------------------------------------------------------------------------------


def test_a_dry_run_reaches_nobody(folder, capsys):
    push_command([str(folder), ID, "--dry-run", "--license", "mit"])
    said = capsys.readouterr().out
    assert all(f"  {name}  " in said for name in FILES)
    assert "license: mit" in (folder / "hub/README.md").read_text()


@pytest.mark.parametrize("arguments, message", [
    (["nowhere", ID], "nowhere is no exported model"), ([], "name FOLDER and USER/NAME, or --all DIR"),
    (["--all", "."], "no folder in it has a config.json"),
])
def test_folders_that_cannot_be_pushed(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        push_command([*arguments, "--dry-run"])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_damaged_folder_is_not_pushed(hub, folder):
    """Nor is a repository made for it."""
    file = folder / "last/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ApartError, match="is damaged: its sha256"):
        push(folder, ID)
    assert not any("/repos/create" in path for _, path in hub.requests)


def test_comparison_with_another_run(folder, tmp_path):
    other = Path(shutil.copytree(folder, tmp_path / "standard"))
    config = json.loads((other / "last/config.json").read_text())
    config["apart"] |= {"method": "standard", "passes": 1, "results": config["apart"]["results"] | {"top1": 10.0}}
    (other / "last/config.json").write_text(json.dumps(config))
    staged = stage(folder, ID, PushOptions(compare_with=other))
    top1 = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["top1"]
    text = (staged / "README.md").read_text()
    assert f"| standard | 1 | 2 | 10.00 |  |\n| apart | 2 | 2 | {top1:.2f} | {top1 - 10:+.2f} |" in text
    config["architecture"] = "resnet18"
    (other / "last/config.json").write_text(json.dumps(config))
    with pytest.raises(ApartError, match="are of the networks 'test_resnet' and 'resnet18'"):
        stage(folder, ID, PushOptions(compare_with=other))


@pytest.mark.parametrize("content", ["{", "[]", '{"architecture": "resnet18"}', '{"apart": 3}'])
def test_a_config_that_is_none(content, folder):
    (folder / "last/config.json").write_text(content)
    for read in (lambda: load_pretrained(str(folder)), lambda: stage(folder, ID)):
        with pytest.raises(ApartError, match="is no exported model"):
            read()


def test_weights_without_a_record_that_are_cut(folder):
    config = json.loads((folder / "last/config.json").read_text())
    del config["apart"]["sha256"]
    (folder / "last/config.json").write_text(json.dumps(config))
    (folder / "last/model.safetensors").write_bytes(b"")
    with pytest.raises(ApartError, match="is no model that timm loads"):
        load_pretrained(str(folder))
    (folder / "metrics.jsonl").write_text("{")
    with pytest.raises(ApartError, match=r"metrics\.jsonl cannot be read"):
        stage(folder, ID)


def test_names_that_are_not_there(online):
    start = time.perf_counter()
    with pytest.raises(ApartError, match=r"typo/folder is no local folder, and http.* cannot be reached"):
        load_pretrained("typo/folder")
    assert time.perf_counter() - start < 8
    for name in ("a b/c", "../x", "user/.."):
        with pytest.raises(ApartError, match="is no name for a repository"):
            load_pretrained(name)
    with pytest.raises(ApartError, match="unknown pretrained model 'nothing'"):
        load_pretrained("nothing")
    assert all("/" not in name for name in list_pretrained())
