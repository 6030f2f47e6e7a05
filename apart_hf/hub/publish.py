"""Publishing a run or an exported folder: staged, verified in a process of its own, pushed as one commit."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoSibling
from safetensors.torch import load_file, save_file

from apart_hf.errors import ApartError
from apart_hf.hub.card import comparison, make_card
from apart_hf.hub.export import probe
from apart_hf.hub.model_folder import (
    CONFIG,
    WEIGHTS,
    Exported,
    check_intact,
    read_config,
    update_record,
    weights_folder,
)
from apart_hf.hub.pretrained import load_pretrained
from apart_hf.models import is_registered_here
from apart_hf.utils.files import sha256
from apart_hf.utils.hub_client import attempt, check_repo_id

CARD = "README.md"
PUBLISHED = (WEIGHTS, CONFIG, CARD, "metrics.jsonl", "compared_with.jsonl", "test.json", "plots/training.png")


@dataclass(frozen=True)
class PushOptions:
    """How a folder is pushed.

    Args:
        private: of a repository that is made.
        revision: branch; made where it is not there.
        create_pr: as a pull request.
        commit_message: of the one commit.
        compare_with: another run, for a table in the card.
        license: of the weights; None: the one recorded.
    """

    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    compare_with: Path | None = None
    license: str | None = None


def stage(folder: Path, repo_id: str, options: PushOptions = PushOptions(), previous: str | None = None) -> Path:
    """Gather what is published, with its card, and return its folder: a run's own "hub", or `folder` itself, whose card
    (and, by `options.license`, config.json) is then replaced.

    Args:
        folder: a run's output, or a folder in timm's form.
        repo_id: the name on the Hub.
        options: what the card shows.
        previous: the card that is there already; its hand-written parts are kept.

    Raises: ApartError where the folder, its weights or an earlier card cannot be read, the weights are not those of
        their record, or the run to compare with is of another network.
    """
    Exported.read(folder)
    weights = weights_folder(folder)
    check_intact(weights)
    staged = folder if weights == folder else folder / "hub"
    if staged != folder:
        for name in PUBLISHED:
            source = weights / name if name in (WEIGHTS, CONFIG) else folder / name
            if name != CARD and source.exists():
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, staged / name)
    if options.license is not None:
        config = json.loads((staged / CONFIG).read_text())
        config["pretrained_cfg"]["license"] = options.license
        (staged / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if options.compare_with is not None:
        update_record(staged, compared_with=comparison(staged, options.compare_with))
        shutil.copyfile(options.compare_with / "metrics.jsonl", staged / "compared_with.jsonl")
    here = staged / CARD
    if previous is None and staged == folder and here.exists():  # a run's own may be of another repository
        previous = here.read_text(errors="replace")
    card = make_card(staged, repo_id, previous=previous)
    card.save(here)
    return staged


def published_files(staged: Path) -> list[str]:
    """Names of what goes up, and nothing else of the folder."""
    return [name for name in PUBLISHED if (staged / name).is_file()]


def verify(staged: Path) -> None:
    """Load the folder by timm in a fresh process and compare the logits with those of this process, and the checksum.

    Raises: ApartError where they differ or the folder does not load.
    """
    model, _ = load_pretrained(str(staged))  # compares the checksum
    config = read_config(staged)
    noise = probe(tuple(config["pretrained_cfg"]["input_size"]))
    with torch.no_grad():
        want = model(noise)
    ours = "import apart_hf; " if is_registered_here(config["architecture"]) else ""
    with tempfile.TemporaryDirectory() as scratch:
        images, logits = Path(scratch) / "images.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"images": noise}, images)
        code = (
            f"{ours}import sys, timm, torch; from safetensors.torch import load_file, save_file; "
            f"torch.set_num_threads({torch.get_num_threads()}); "
            "model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval(); "
            "torch.set_grad_enabled(False); "
            "save_file({'logits': model(load_file(sys.argv[2])['images'])}, sys.argv[3])"
        )
        command = [sys.executable, "-c", code, str(staged), str(images), str(logits)]
        loaded = subprocess.run(command, capture_output=True, text=True, check=False)
        if loaded.returncode:
            reason = (loaded.stderr.strip().splitlines() or ["no message"])[-1]
            raise ApartError(f"{staged} does not load in timm ({reason}); export it again.")
        found = load_file(logits)["logits"]
    if not torch.allclose(found, want, rtol=1e-5, atol=1e-6):
        worst = (found - want).abs().max().item()
        raise ApartError(f"{staged} gives other logits in a fresh process (by {worst:.3g}); it is not pushed.")


def push(folder: Path, repo_id: str, options: PushOptions = PushOptions()) -> str:
    """Publish a run or a folder in timm's form as one commit, and return its address.

    Safe to run again: what is there already is not sent twice.

    Raises: ApartError, with the repository as it was, where it cannot be done; the staged folder stays ready.
    """
    Exported.read(folder)
    check_intact(weights_folder(folder))
    api = check_access(repo_id)
    staged = stage(folder, repo_id, options, previous=_card_there(api, repo_id, options.revision))
    verify(staged)
    card = ModelCard.load(staged / CARD)
    attempt(lambda: _validate(card), repo_id)
    attempt(lambda: api.create_repo(repo_id, private=options.private or None, exist_ok=True), repo_id)
    if options.private and not attempt(lambda: api.model_info(repo_id), repo_id).private:
        raise ApartError(f"{repo_id} is there already and is public; make it private on its page, or drop --private.")
    branch = options.revision
    if branch is not None:
        attempt(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True), repo_id)
    return _commit(api, staged, repo_id, options)


def check_access(repo_id: str) -> HfApi:
    """A client whose token the Hub accepts.

    Raises: ApartError for a name that the Hub does not take, and where there is no token, or a bad one.
    """
    check_repo_id(repo_id)
    if get_token() is None:
        raise ApartError("there is no token for the Hub; log in (hf auth login) or set HF_TOKEN, then run this again.")
    api = HfApi()
    attempt(api.whoami, repo_id)
    return api


def _card_there(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    # asked first: a download would take that of a repository which is gone from the cache
    if not attempt(lambda: api.file_exists(repo_id, CARD, revision=revision), repo_id):
        return None
    path = attempt(lambda: api.hf_hub_download(repo_id, CARD, revision=revision), repo_id)
    return Path(path).read_text(errors="replace")


def _validate(card: ModelCard) -> None:
    try:
        card.validate()
    except HfHubHTTPError:
        raise
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ApartError(f"the Hub does not accept the card ({reason}); correct its metadata.") from error


def _commit(api: HfApi, staged: Path, repo_id: str, options: PushOptions) -> str:
    """One commit; where its answer is lost, the repository is asked whether it arrived before it is sent again."""
    files = published_files(staged)
    head = attempt(lambda: api.model_info(repo_id, revision=options.revision).sha, repo_id)
    config = read_config(staged)
    method = config["apart"].get("method")
    message = options.commit_message or f"{config['architecture']}{f', trained by {method}' if method else ''}"

    def upload() -> str:
        return str(
            api.upload_folder(
                repo_id=repo_id,
                folder_path=staged,
                allow_patterns=files,
                commit_message=message,
                revision=options.revision,
                create_pr=options.create_pr or None,
            )
        )

    def arrived() -> str | None:
        if options.create_pr:
            return None
        info = api.model_info(repo_id, revision=options.revision, files_metadata=True)
        if info.sha == head:
            return None
        there = {file.rfilename: file for file in info.siblings or ()}
        same = all(name in there and _same_file(there[name], staged / name) for name in files)
        return f"{api.endpoint}/{repo_id}/commit/{info.sha}" if same else None

    return attempt(upload, repo_id, arrived=arrived, again=not options.create_pr)


def _same_file(there: RepoSibling, here: Path) -> bool:
    if there.lfs is not None:
        return there.lfs.sha256 == sha256(here)
    content = here.read_bytes()  # git's own name for a file
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
