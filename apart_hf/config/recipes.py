"""The paper's settings (Section 4) as data: a dataset and network, and a method on it.

A recipe's name is BASE-METHOD or BASE-METHOD-mixup, for instance `cifar100-wrn40-apart`; `recipe(name)` gives its
settings under the names of `TrainConfig`. What is not published: the mixup alpha of APART on CIFAR (0.2, that of
Tiny-ImageNet, is taken), and SAM's radius on Tiny-ImageNet and ImageNet (there is no recipe for it).
"""

from __future__ import annotations

from typing import Any

from apart_hf.errors import unknown_name

_CIFAR = {"batch_size": 128, "epochs": 200, "decay_milestones": [100, 150], "weight_decay": 5e-4}
_USUAL = {"opt": "momentum", "momentum": 0.9, "lr": 0.1, "sched": "multistep"}
#: dataset and network
_BASES: dict[str, dict[str, Any]] = {
    "cifar10-wrn40": {"dataset": "cifar10", "model": "wide_resnet40_2", **_CIFAR},
    "cifar10-preact18": {"dataset": "cifar10", "model": "preact_resnet18", **_CIFAR},
    "cifar100-wrn40": {"dataset": "cifar100", "model": "wide_resnet40_2", **_CIFAR},
    "cifar100-preact18": {"dataset": "cifar100", "model": "preact_resnet18", **_CIFAR},
    "tiny-imagenet-preact18": {"dataset": "tiny-imagenet", "model": "preact_resnet18", **_CIFAR, "batch_size": 256},
    "imagenet-resnet18": {
        "dataset": "imagenet",
        "model": "resnet18",
        "batch_size": 256,
        "epochs": 105,
        "decay_milestones": [30, 60, 90, 100],
        "weight_decay": 1e-4,
    },
}
_APART = {"epsilon": 0.1, "groups": 16, "ratio": 1.0}
#: the methods' hyper-parameters by dataset, and the alpha of mixup beside each
_HYPER: dict[str, dict[str, dict[str, Any]]] = {
    "cifar10": {"apart": _APART, "apart-sam": {**_APART, "rho": 0.2}, "sam": {"rho": 0.05}},
    "cifar100": {"apart": _APART, "apart-sam": {**_APART, "rho": 0.2}, "sam": {"rho": 0.1}},
    "tiny-imagenet": {"apart": {**_APART, "groups": 8}, "apart-sam": {**_APART, "groups": 8, "rho": 0.2}},
    "imagenet": {
        "apart": {"epsilon": 0.025, "groups": 1, "ratio": 1.0},
        "apart-sam": {"epsilon": 0.025, "groups": 1, "ratio": 1.0, "rho": 0.025},
    },
}
_MIXUP: dict[str, dict[str, float]] = {
    "cifar10": {"standard": 1.0, "apart": 0.2, "apart-sam": 0.2},
    "cifar100": {"standard": 1.0, "apart": 0.2, "apart-sam": 0.2},
    "tiny-imagenet": {"standard": 0.2, "apart": 0.2, "apart-sam": 0.2},
}


def _recipes() -> dict[str, dict[str, Any]]:
    found = {}
    for base, settings in _BASES.items():
        dataset = settings["dataset"]
        for method, hyper in {"standard": {}, **_HYPER[dataset]}.items():
            plain = {**_USUAL, **settings, "method": method, **hyper}
            found[f"{base}-{method}"] = plain
            if method in _MIXUP.get(dataset, {}):
                found[f"{base}-{method}-mixup"] = plain | {"mixup": _MIXUP[dataset][method]}
    return found


RECIPES = _recipes()


def recipe(name: str) -> dict[str, Any]:
    """Return the settings of a recipe.

    Raises:
        ApartError: for an unknown name.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return dict(RECIPES[name])
