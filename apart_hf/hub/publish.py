"""Publishing a run or an exported folder: staged, verified, pushed as one commit."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoSibling

from apart_hf.errors import ApartError
from apart_hf.hub.model_folder import Exported, check_intact, read_config, weights_folder
from apart_hf.hub.staging import CARD, PushOptions, published_files, stage, verify
from apart_hf.utils.files import sha256
from apart_hf.utils.hub_client import attempt, check_repo_id


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    compare_with: str | Path | None = None,
    license: str | None = None,
) -> str:
    """Publish a trained model on the Hugging Face Hub: weights, configuration and a model card, as one commit.

    The weights are first loaded by timm in a process of its own and compared. It is safe to run again: what is there
    already is not sent twice. The token is that of `hf auth login`, or of the variable HF_TOKEN.

    Args:
        folder: what `train` returned, or a folder that `timm.models.save_for_hf` wrote.
        repo_id: the repository, "user/name"; it is made where it is not there.
        private: whether a repository that is made is private.
        revision: the branch to push to, made where it is not there; None: main.
        create_pr: whether to open a pull request instead.
        commit_message: the title of the commit; None: the architecture and the method.
        compare_with: the folder of another run of the same network and data, for a table of both in the card.
        license: the licence of the weights, as the Hub spells it; None: the one that the folder records.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ApartError: where the folder or its weights cannot be read, the token or the name is not accepted, or the Hub
            does not answer. The repository is then as it was, and running the same again is safe.

    Example:
        >>> from apart_hf import push_to_hub
        >>> url = push_to_hub("output/my-run", "user/my-model", license="apache-2.0")
        >>> url.split("/commit/")[0].endswith("/user/my-model")
        True
    """
    other = None if compare_with is None else Path(compare_with)
    return push(Path(folder), repo_id, PushOptions(private, revision, create_pr, commit_message, other, license))


def push(folder: Path, repo_id: str, options: PushOptions | None = None) -> str:
    """Do what `push_to_hub` does, by its options as one record; None: the usual ones."""
    options = options or PushOptions()
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
    """Make a client whose token the Hub accepts.

    Raises:
        ApartError: for a name that the Hub does not take, and where there is no token, or a bad one.
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
    """Send one commit; where its answer is lost, the repository is asked whether it arrived before it is sent again."""
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
