"""The hub of the tests answers the real clients as the Hub does, and fails as it is told to."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from PIL import Image


def failure(call, *arguments, **more):
    """(type, message) of what it raises."""
    try:
        call(*arguments, **more)
    except Exception as error:
        return type(error).__name__, " ".join(str(error).split())


def contents(folder):
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes().hex() for path in files}


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """Runs code of a user who has a token; what it put into `seen`, as JSON has it."""

    def run(code, token="hf_write", given=None):
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        names = (HfApi, ModelCard, Path, contents, failure, hf_hub_download, snapshot_download, time)
        scope = {name.__name__: name for name in names} | {"api": HfApi(), "work": tmp_path, "given": given, "seen": {}}
        exec(code, scope)
        return json.loads(json.dumps(scope["seen"]))

    return run


def readable(files):
    return {path: data.hex() for path, data in files.items()}


CARD = b"---\nlibrary_name: timm\ntags:\n- apart\n- image-classification\n---\n# A model\n"


@pytest.fixture
def folder(tmp_path):
    files = {"README.md": CARD, "config.json": b"{}", "model.safetensors": bytes(range(256)) * 400, "a/b/c.png": b"png"}
    for path, data in files.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(data)
    return files


def test_an_uploaded_folder_comes_back_in_every_revision(hub, client, folder):
    seen = client("""
api.create_repo("user/m")
api.create_repo("user/m", exist_ok=True)
api.create_repo("team/secret", private=True)
first = api.upload_folder(repo_id="user/m", folder_path=work / "folder", commit_message="one")
seen["first"] = contents(snapshot_download("user/m", local_dir=work / "first"))
(work / "folder/model.safetensors").write_bytes(b"other")
second = api.upload_folder(repo_id="user/m", folder_path=work / "folder", commit_message="two")
seen["old"] = contents(snapshot_download("user/m", revision=first.oid, local_dir=work / "old"))
seen["new"] = Path(hf_hub_download("user/m", "model.safetensors")).read_text()
(work / "folder/config.json").write_bytes(b"[]")
seen["pr"] = api.upload_folder(repo_id="user/m", folder_path=work / "folder", create_pr=True).pr_revision
api.create_branch("user/m", branch="dev", revision=first.oid)
api.upload_file(repo_id="user/m", path_or_fileobj=b"dev", path_in_repo="dev/file.txt", revision="dev")
api.delete_file("config.json", "user/m", revision="dev")
api.upload_folder(repo_id="user/m", folder_path=work / "folder", revision="refs/pr/1")
seen["card"] = ModelCard.load("user/m").data.tags
seen["whoami"] = api.whoami()["name"]
seen["listed"] = [[model.id for model in api.list_models(author="user", filter=tag)] for tag in ("apart", "x")]
seen["private"] = contents(snapshot_download("team/secret", local_dir=work / "secret"))
info = api.model_info("user/m", revision=second.oid)
seen["info"] = [info.sha == second.oid == api.model_info("user/m").sha, sorted(s.rfilename for s in info.siblings)]
refs = api.list_repo_refs("user/m", include_pull_requests=True)
seen["refs"] = [ref.ref for ref in refs.branches + refs.pull_requests]
seen["tree"] = [entry.path for entry in api.list_repo_tree("user/m")]
seen["deep"] = [entry.path for entry in api.list_repo_tree("user/m", "a", recursive=True, expand=True)]
seen["paths"] = [entry.path for entry in api.get_paths_info("user/m", ["a/b/c.png", "a", "none"])]
seen["exists"] = [api.file_exists("user/m", path) for path in ("config.json", "none")]
""")
    attributes = {".gitattributes": hub.files("team/secret")[".gitattributes"]}
    assert seen["first"] == seen["old"] == readable(folder | attributes)
    assert seen["new"] == "other"
    assert hub.files("user/m") == folder | attributes | {"model.safetensors": b"other"}
    assert hub.commits("user/m") == ["initial commit", "one", "two"]
    assert seen["pr"] == "refs/pr/1"
    assert hub.pull_requests("user/m") == ["refs/pr/1"]
    assert hub.files("user/m", revision="refs/pr/1")["config.json"] == b"[]"
    in_dev = (folder | attributes).keys() - {"config.json"} | {"dev/file.txt"}
    assert hub.files("user/m", revision="dev").keys() == in_dev
    assert seen["card"] == ["apart", "image-classification"]
    assert seen["whoami"] == "user"
    assert seen["listed"] == [["user/m"], []]
    assert seen["private"] == readable(attributes)
    assert seen["info"] == [True, sorted(folder | attributes)]
    assert seen["refs"] == ["refs/heads/main", "refs/heads/dev", "refs/pr/1"]
    assert seen["tree"] == [".gitattributes", "README.md", "a", "config.json", "model.safetensors"]
    assert seen["deep"] == ["a/b", "a/b/c.png"]
    assert seen["paths"] == ["a", "a/b/c.png"]
    assert seen["exists"] == [True, False]


def test_timm_loads_what_it_pushed(hub, client):
    seen = client("""
import timm, torch
from timm.models import save_for_hf
model = timm.create_model("test_resnet", num_classes=3).eval()
save_for_hf(model, work / "model", model_config={"label_names": ["a", "b", "c"]}, safe_serialization=True)
api.create_repo("user/m")
api.upload_folder(repo_id="user/m", folder_path=work / "model")
images = torch.rand(2, 3, 64, 64)
seen["labels"] = timm.create_model("hf_hub:user/m").pretrained_cfg["label_names"]
with torch.no_grad():
    seen["same"] = torch.equal(timm.create_model("hf_hub:user/m", pretrained=True).eval()(images), model(images))
""")
    assert seen == {"labels": ["a", "b", "c"], "same": True}
    assert {method for method, path in hub.requests if "/lfs/" in path} == {"POST", "PUT"}
    assert "model.safetensors" in hub.files("user/m")


def parquet(rows):
    """A few images with labels, as `datasets` writes them."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    file = io.BytesIO()
    images = [Image.new("RGB", (8, 8), (9 * row, 0, 0)) for row in range(rows)]
    datasets.Dataset.from_dict({"image": images, "label": [0, 1] * (rows // 2)}, features=features).to_parquet(file)
    return file.getvalue()


def test_datasets_loads_and_streams(hub, client):
    train, test = (f"data/{split}-00000-of-00001.parquet" for split in ("train", "test"))
    hub.put("user/d", {train: parquet(6), test: parquet(2)}, "dataset")
    revision = hub.put("user/d", {"README.md": b"# Images"}, "dataset")
    hub.put("user/d", {test: parquet(4)}, "dataset")
    hub.create("user/gated", "dataset", gated=True)
    hub.create("other/private", "dataset", private=True)
    seen = client(
        """
from datasets import load_dataset
def shapes(data):
    return [(row["image"].size, row["image"].getpixel((0, 0))[0], row["label"]) for row in data]
seen["loaded"] = {split: shapes(data) for split, data in load_dataset("user/d").items()}
seen["streamed"] = {split: shapes(data) for split, data in load_dataset("user/d", streaming=True).items()}
seen["pinned"] = load_dataset("user/d", split="test", revision=given).num_rows
seen["names"] = load_dataset("user/d", split="train").features["label"].names
for name in ("user/gated", "other/private", "user/none"):
    seen[name] = failure(load_dataset, name)
seen["anonymous"] = failure(load_dataset, "user/gated", token=False)
seen["revision"] = failure(load_dataset, "user/d", revision="v9")
seen["model"] = failure(api.model_info, "user/d")
seen["gated file"] = failure(hf_hub_download, "user/gated", "README.md", repo_type="dataset")
seen["missing file"] = failure(hf_hub_download, "user/d", "none", repo_type="dataset")
seen["info"] = api.dataset_info("user/gated").gated
""",
        given=revision,
    )
    rows = [[[8, 8], 9 * row, row % 2] for row in range(6)]
    assert seen["loaded"] == seen["streamed"] == {"train": rows, "test": rows[:4]}
    assert seen["pinned"] == 2
    assert seen["names"] == ["a", "b"]
    for name, kind, message in [
        ("user/gated", "DatasetNotFoundError", "is a gated dataset on the Hub. Visit the dataset page"),
        ("anonymous", "DatasetNotFoundError", "is a gated dataset on the Hub. You must be authenticated"),
        ("other/private", "DatasetNotFoundError", "doesn't exist on the Hub or cannot be accessed"),
        ("user/none", "DatasetNotFoundError", "doesn't exist on the Hub or cannot be accessed"),
        ("revision", "DatasetNotFoundError", "Revision 'v9' doesn't exist for dataset 'user/d'"),
        ("model", "RepositoryNotFoundError", "404 Client Error"),
        ("gated file", "GatedRepoError", "403 Client Error"),
        ("missing file", "RemoteEntryNotFoundError", "404 Client Error"),
    ]:
        assert seen[name][0] == kind and message in seen[name][1], (name, seen[name])
    assert seen["info"] is True


def test_tokens(hub, client, folder):
    hub.put("user/m", folder)
    hub.create("other/m")
    hub.create("user/private", private=True)
    read_only = client(
        """
seen["role"] = api.whoami()["auth"]["accessToken"]["role"]
seen["create"] = str(api.create_repo("user/m", exist_ok=True)).split("/", 3)[3]
seen["create new"] = failure(api.create_repo, "user/new", exist_ok=True)
seen["upload"] = failure(api.upload_folder, repo_id="user/m", folder_path=work / "folder")
seen["private"] = len(contents(snapshot_download("user/private", local_dir=work / "private")))
""",
        "hf_read",
    )
    assert read_only["role"] == "read"
    assert read_only["create"] == "user/m"
    assert read_only["create new"][0] == read_only["upload"][0] == "HfHubHTTPError"
    assert "403 Forbidden: You don't have the rights to create a model" in read_only["create new"][1]
    assert "403 Forbidden: you must use a write token" in read_only["upload"][1]
    assert "/preupload/main" in read_only["upload"][1]
    assert read_only["private"] == 1
    other = client("""
seen["namespace"] = failure(api.create_repo, "strangers/m", exist_ok=True)
seen["bad"] = failure(HfApi(token="hf_bad").create_repo, "user/m", exist_ok=True)
seen["bad whoami"] = failure(HfApi(token="hf_bad").whoami)
seen["bad download"] = failure(hf_hub_download, "user/m", "config.json", token="hf_bad")
file = {"path_or_fileobj": b"", "path_in_repo": "empty"}
seen["anonymous upload"] = failure(HfApi(token=False).upload_file, repo_id="user/m", **file)
weights = {"path_or_fileobj": b"weights", "path_in_repo": "model.safetensors"}
seen["others"] = failure(api.upload_file, repo_id="other/m", **weights)
seen["pr"] = api.upload_file(repo_id="other/m", create_pr=True, **weights).pr_revision
seen["anonymous"] = Path(hf_hub_download("user/m", "config.json", token=False)).read_text()
seen["private"] = failure(HfApi(token=False).model_info, "user/private")
""")
    assert other["anonymous"] == "{}"
    for name, kind, message in [
        ("namespace", "HfHubHTTPError", 'under the namespace "strangers"'),
        ("bad", "HfHubHTTPError", "401 Unauthorized"),
        ("bad whoami", "HfHubHTTPError", "Invalid user token."),
        ("bad download", "HfHubHTTPError", "401 Unauthorized"),
        ("anonymous upload", "RepositoryNotFoundError", "Invalid username or password."),
        ("private", "RepositoryNotFoundError", "404 Client Error"),
        ("others", "HfHubHTTPError", "403 Forbidden: Authorization error."),
    ]:
        assert other[name][0] == kind and message in other[name][1], (name, other[name])
    assert hub.files("other/m", revision=other["pr"])["model.safetensors"] == b"weights"
    assert hub.commits("user/m") == ["initial commit", "put"]


def test_faults(hub, client, folder):
    folder.pop("README.md")
    for name in ("busy", "lost", "reset", "there", "failed"):
        hub.create(f"user/{name}")
    hub.put("user/bad", folder)
    hub.corrupt("user/bad", "model.safetensors")
    hub.fail("user/busy/preupload", status=429, headers={"Retry-After": "0"})
    hub.fail("user/busy.git/info/lfs", status=503)
    hub.fail("user/busy/lfs/", method="PUT", cut=True, cut_after=100)
    hub.fail("user/lost/commit/", cut=True)
    hub.fail("user/reset/commit/", cut=True, cut_after=10)
    hub.fail("user/there/commit/", cut=True, after=True)
    hub.fail("user/failed/commit/", status=500, body={"error": "Internal trouble"}, after=True)
    hub.fail("user/bad/resolve/.*safetensors", method="GET", cut=True, cut_after=1000)
    hub.fail("user/lost$", delay=0.5)
    hub.fail("user/reset$", status=503, times=None)
    hub.fail("validate-yaml", status=400, body={"errors": [{"message": "no license"}], "warnings": []})
    assert hub.faults_left() == 10
    seen = client("""
(work / "folder/README.md").unlink()
def upload(name):
    return api.upload_folder(repo_id="user/" + name, folder_path=work / "folder", commit_message="up")
seen["busy"] = len(upload("busy").oid)
for name in ("lost", "reset", "there", "failed"):
    seen[name] = failure(upload, name)
seen["again"] = upload("there").oid == api.model_info("user/there").sha
seen["bad"] = contents(snapshot_download("user/bad"))
start = time.monotonic()
api.model_info("user/lost")
seen["delay"] = time.monotonic() - start
seen["always"] = [failure(api.model_info, "user/reset")[0] for _ in range(2)]
seen["card"] = failure(api.upload_file, repo_id="user/there", path_or_fileobj=b"card", path_in_repo="README.md")
""")
    assert hub.faults_left() == 0
    assert seen["busy"] == 40
    assert hub.files("user/busy").items() >= folder.items()
    assert seen["lost"][0] == "RemoteProtocolError"
    assert seen["reset"][0] == "ReadError"
    assert hub.commits("user/lost") == hub.commits("user/reset") == ["initial commit"]
    assert seen["there"][0] == "RemoteProtocolError"
    assert seen["failed"][0] == "HfHubHTTPError" and "Internal trouble" in seen["failed"][1]
    assert hub.commits("user/there") == hub.commits("user/failed") == ["initial commit", "up"]
    assert seen["again"] is True  # nothing left to commit
    weights = bytes.fromhex(seen["bad"].pop("model.safetensors"))
    assert len(weights) == len(folder["model.safetensors"])
    assert weights != folder["model.safetensors"]
    assert seen["bad"].items() >= readable(folder).items() - {("model.safetensors", folder["model.safetensors"].hex())}
    assert seen["delay"] >= 0.5
    assert seen["always"] == ["HfHubHTTPError", "HfHubHTTPError"]
    assert seen["card"] == ["ValueError", "Invalid metadata in README.md. - no license"]
    hub.reset_faults()
    assert ("POST", "/api/models/user/busy/commit/main") in hub.requests
