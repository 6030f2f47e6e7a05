"""What happens when publishing or loading fails: survived, or one line, and never half a repository."""

import contextlib
import json
import re
import time

import pytest

from apart_hf import ApartError, list_pretrained, load_pretrained
from apart_hf.cli.push_to_hub import main as push_command
from apart_hf.config.train_config import TrainConfig
from apart_hf.hub.publish import push
from apart_hf.hub.staging import PushOptions, stage
from apart_hf.runs.train import train
from tests.support.helpers import PUSHED, REPO, arrived

ENDPOINTS = [
    "/api/whoami-v2",
    "/api/repos/create",
    "/api/validate-yaml",
    "/preupload/",
    "/info/lfs/objects/batch",
    "/lfs/",
    "/commit/",
    f"^/api/models/{REPO}",
    "/resolve/",
]


@pytest.mark.parametrize(
    "endpoint, fault",
    [
        (endpoint, fault)
        for endpoint in ENDPOINTS
        for fault in ({"status": 503}, {"cut": True})
        if (endpoint, "cut" in fault) != ("/lfs/", True)  # see test_a_cut_upload
    ],
)
def test_a_passing_fault_anywhere_is_survived(endpoint, fault, hub, quickly, folder):
    hub.fail(endpoint, **fault)
    push(folder, REPO)
    assert hub.faults_left() == 0 and arrived(hub) == PUSHED and len(hub.commits(REPO)) == 2


@pytest.mark.parametrize("endpoint", ["/api/repos/create", "/commit/"])
def test_it_waits_as_long_as_the_server_asks(endpoint, hub, quickly, folder):
    hub.fail(endpoint, status=429, headers={"Retry-After": "1"})
    start = time.perf_counter()
    push(folder, REPO)
    assert time.perf_counter() - start > 1 and arrived(hub) == PUSHED and len(hub.commits(REPO)) == 2


@pytest.mark.parametrize("endpoint", ["/api/repos/create", "/api/validate-yaml", "/commit/"])
def test_a_lasting_fault_ends_in_one_line_and_a_rerun_finishes(endpoint, hub, quickly, folder):
    hub.fail(endpoint, status=500, times=None)
    with pytest.raises(ApartError, match=r"the Hub answered 500 .*run the same command again") as error:
        push(folder, REPO)
    assert "\n" not in str(error.value)
    with contextlib.suppress(KeyError):
        assert arrived(hub) == set()
    hub.reset_faults()
    push(folder, REPO)
    assert arrived(hub) == PUSHED and len(hub.commits(REPO)) == 2


@pytest.mark.parametrize("fault", [{"cut": True}, {"status": 504}])
def test_a_commit_whose_answer_is_lost_is_not_made_twice(fault, hub, quickly, folder):
    hub.fail("/commit/", **fault, after=True)
    assert push(folder, REPO).endswith(f"/{REPO}/commit/{_head(hub)}")
    assert len(hub.commits(REPO)) == 2 and arrived(hub) == PUSHED


def _head(hub):
    from huggingface_hub import HfApi

    return HfApi().model_info(REPO).sha


def test_a_pull_request_is_not_opened_twice(hub, quickly, folder):
    push(folder, REPO)
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() * 2)
    hub.fail("/commit/", cut=True, after=True)
    with pytest.raises(ApartError, match="gave no answer"):
        push(folder, REPO, PushOptions(create_pr=True))
    assert len(hub.pull_requests(REPO)) == 1


def test_an_upload_that_is_refused(hub, quickly, folder):
    hub.fail("/lfs/", status=403, times=None)
    with pytest.raises(ApartError, match="may not write to"):
        push(folder, REPO)
    assert arrived(hub) == set()


def test_a_cut_upload(hub, quickly, folder):
    """The client tries five times, which takes a while; then the line, and the rerun."""
    hub.fail("/lfs/", cut=True, cut_after=1000, times=1)
    push(folder, REPO)
    assert arrived(hub) == PUSHED


@pytest.mark.parametrize(
    "token, repo_id, message",
    [
        ("hf_wrong", REPO, "the Hub does not take the token"),
        ("hf_read", REPO, "may not write to"),
        ("hf_write", "someone/m", "may not write to someone/m"),
        ("", REPO, "there is no token for the Hub"),
        ("hf_write", "no/name/at-all", "is no name for a repository"),
        ("hf_write", "user/bad name", "is no name"),
        ("hf_write", "name", "is no name for a repository"),
    ],
)
def test_who_may_push(token, repo_id, message, hub, quickly, folder, monkeypatch, capsys):
    push(folder, REPO)
    monkeypatch.setenv("HF_TOKEN", token)
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() * 2)
    with pytest.raises(SystemExit) as stop:
        push_command([str(folder), repo_id])
    said = capsys.readouterr()
    assert stop.value.code == 2 and re.search(message, said.err) and said.err.count("\n") == 1, said.err
    assert not token or token not in said.err + said.out
    assert len(hub.commits(REPO)) == 2


def test_a_token_is_refused_before_training(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ApartError, match="does not take the token"):
        train(TrainConfig(model="test_resnet", push_to_hub=REPO, output=str(tmp_path / "out")))
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
        push(folder, REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ApartError, match="HF_HUB_OFFLINE is set"):
        push(folder, REPO)
    assert time.perf_counter() - start < 10


def test_a_failed_push_after_training_loses_nothing(hub, quickly, tmp_path, capsys):
    from apart_hf.cli.train import main

    hub.fail("/commit/", status=500, times=None)
    with pytest.raises(SystemExit) as stop:
        main(["--model", "test_resnet", "--max-steps", "1", "--output", str(tmp_path), "--push-to-hub", REPO])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"apart-hf push {tmp_path}/demo-test_resnet-apart {REPO}" in error
    hub.reset_faults()
    push_command([str(tmp_path / "demo-test_resnet-apart"), REPO])
    assert arrived(hub) == PUSHED


def test_an_export_that_does_not_load_makes_no_repository(hub, quickly, folder, monkeypatch):
    def fails(staged):
        raise ApartError("it does not load")

    with monkeypatch.context() as patch, pytest.raises(ApartError, match="does not load"):
        patch.setattr("apart_hf.hub.publish.verify", fails)
        push(folder, REPO, PushOptions(revision="new"))
    with pytest.raises(KeyError):
        hub.files(REPO)
    push(folder, REPO, PushOptions(revision="new"))
    assert arrived(hub, revision="new") == PUSHED and arrived(hub) == set()


def test_a_damaged_folder_is_not_pushed(hub, folder):
    """Nor is a repository made for it."""
    file = folder / "last/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ApartError, match="is damaged: its sha256"):
        push(folder, REPO)
    assert not any("/repos/create" in path for _, path in hub.requests)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere", REPO], "nowhere is no exported model"),
        ([], "name FOLDER and USER/NAME, or --all DIR"),
        (["--all", "."], "no folder in it has a config.json"),
    ],
)
def test_folders_that_cannot_be_pushed(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        push_command([*arguments, "--dry-run"])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"architecture": "resnet18"}', '{"apart": 3}'])
def test_a_config_that_is_none(content, folder):
    (folder / "last/config.json").write_text(content)
    for read in (lambda: load_pretrained(str(folder)), lambda: stage(folder, REPO)):
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
        stage(folder, REPO)


def test_names_that_are_not_there(online, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no folder of the machine has such a name
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
