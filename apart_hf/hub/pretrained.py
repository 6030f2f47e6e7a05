"""Trained models by name: those that come with this package, folders, and repositories of the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError, RevisionNotFoundError
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision import transforms as T

from apart_hf.data.transforms import grey_first
from apart_hf.errors import ApartError, unknown_name
from apart_hf.hub.model_folder import CONFIG, WEIGHTS, check_intact, model_cards_folder, weights_folder
from apart_hf.utils.hub_client import attempt, check_repo_id, offline_if_unreachable


def list_pretrained() -> list[str]:
    """List the trained models that come with this package.

    Returns:
        Names in alphabetical order, each of which `load_pretrained` takes without a connection.

    Example:
        >>> from apart_hf import list_pretrained
        >>> "demo-test_resnet-apart" in list_pretrained()
        True
    """
    return sorted(file.parent.name for file in model_cards_folder().glob(f"*/{CONFIG}"))


def load_pretrained(name: str, *, revision: str | None = None) -> tuple[nn.Module, Callable[[Image], Tensor]]:
    """Load a trained model and the transform of its images.

    Args:
        name: one of `list_pretrained()`, the folder of a run or an exported one, or "user/name", a repository of the
            Hub, also as timm writes it, "hf_hub:user/name" or "hf_hub:user/name@revision".
        revision: the branch, tag or commit of a repository; None: its main branch.

    Returns:
        The timm model in eval mode, and a function from a PIL image to its input, a tensor (3, H, W) that is scaled
        and normalised as the model was evaluated; of a model of grey images (1, H, W), also where the image is RGB.

    Raises:
        ApartError: where there is no such model, or the weights are not those that were exported: their sha256 is
            compared with the one that config.json records (a folder that records none is loaded as it is).

    Example:
        >>> from PIL import Image
        >>> from apart_hf import load_pretrained
        >>> model, transform = load_pretrained("demo-test_resnet-apart")
        >>> image = transform(Image.new("RGB", (28, 28)))
        >>> model(image.unsqueeze(0)).shape
        torch.Size([1, 10])
    """
    folder = intact_pretrained(name, revision=revision)
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ApartError(f"{name} is no model that timm loads ({reason}).") from error
    images = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**images, is_training=False)
    return model, T.Compose([*grey_first(images), *transform.transforms])


def intact_pretrained(name: str, *, revision: str | None = None) -> Path:
    """Find the local folder of a model whose weights are those of its record, see `find_pretrained`.

    Raises:
        ApartError: where there is none.
    """
    folder = find_pretrained(name, revision=revision)
    try:
        check_intact(folder)
    except ApartError:
        folder = find_pretrained(name, revision=revision, afresh=True)  # what the cache holds may be damaged alone
        check_intact(folder)
    return folder


def find_pretrained(name: str, *, revision: str | None = None, afresh: bool = False) -> Path:
    """Find the local folder of a model, fetched from the Hub where `name` is neither a released model nor a folder.

    Args:
        name, revision: see `load_pretrained`.
        afresh: fetch again what the cache holds.

    Raises:
        ApartError: where there is none.
    """
    prefix, colon, repository = name.partition(":")
    if colon and prefix in ("hf_hub", "hf-hub"):
        name, _, of_name = repository.partition("@")
        revision = revision or of_name or None
    released = model_cards_folder() / name
    is_here = name in list_pretrained() or Path(name).is_dir()
    if revision is not None and is_here:
        kind = "comes with apart_hf" if name in list_pretrained() else "is a folder here"
        raise ApartError(f"{name} {kind} and has no revision {revision!r}; leave the revision out.")
    if name in list_pretrained():
        return released
    if Path(name).is_dir():
        folder = weights_folder(Path(name))
        for file in (CONFIG, WEIGHTS):
            if not (folder / file).is_file():
                raise ApartError(f"{folder} has no {file}; name the folder of a run, or one in timm's form.")
        return folder
    if name.count("/") != 1:
        raise unknown_name("pretrained model", name, list_pretrained())
    check_repo_id(name)

    def fetch() -> Path:
        for file in (WEIGHTS, CONFIG):
            path = hf_hub_download(name, file, revision=revision, force_download=afresh)
        return Path(path).parent

    try:
        with offline_if_unreachable() as offline:
            return attempt(fetch, name, reading=True)
    except LocalEntryNotFoundError as error:
        raise ApartError(f"{name} is no local folder, and {offline}; the cache does not hold it.") from error
    except RemoteEntryNotFoundError as error:
        raise ApartError(f"{name} lacks {CONFIG} or {WEIGHTS}; it is no model in timm's form.") from error
    except RevisionNotFoundError as error:
        raise ApartError(f"{name} has no revision {revision!r}; name a branch, tag or commit of it.") from error
