"""Names of datasets as timm writes them, KIND/NAME: which are taken, and what takes the place of the others."""

from __future__ import annotations

from apart_hf.errors import ApartError

HUB = "hfds/"  # before a Hub id
_FOLDER = "--data-dir FOLDER with one folder of images a class"
_TORCHVISION = {
    "cifar10": "--dataset cifar10",
    "cifar100": "--dataset cifar100",
    "fashion_mnist": "--dataset fashion-mnist",
    "imagenet": "--dataset imagenet",
    "mnist": "--dataset ylecun/mnist",
}


def without_prefix(name: str) -> str:
    """Return the Hub id or name that timm's name of a dataset stands for.

    Raises:
        ApartError: for a kind of dataset that is not read here, with what to use instead.
    """
    kind, slash, rest = name.partition("/")
    if slash and "" in name.split("/") and kind not in ("torch", "wds", "tfds", "hfids"):
        usual = f"{HUB}user/name" if kind == "hfds" else "user/name"
        raise ApartError(f"--dataset {name}: needs a Hub id, {usual}; a folder of yours is --data-dir FOLDER.")
    if not slash or kind not in ("hfds", "hfids", "torch", "wds", "tfds"):
        return name
    if kind == "hfds":
        if rest.count("/") != 1:
            raise ApartError(f"--dataset {name}: needs a Hub id, hfds/user/name.")
        return rest
    instead = {
        "hfids": f"streams are --dataset {rest or 'user/name'} --streaming",
        "torch": f"torchvision's archives are not read; use {_torchvision(rest)}",
        "wds": "tar shards are read from their folder, --data-dir FOLDER without --dataset, or from the Hub, "
        "--dataset user/name",
        "tfds": f"TensorFlow's datasets are not read; use a Hub id user/name, or {_FOLDER}",
    }
    raise ApartError(f"--dataset {name}: {instead[kind]}.")


def _torchvision(name: str) -> str:
    if name in ("image_folder", "folder"):
        return f"{_FOLDER}, without --dataset"
    known = _TORCHVISION.get(name, "a Hub id user/name")
    return f"{known}, or {_FOLDER}"
