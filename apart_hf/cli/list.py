"""The command that shows what there is: apart-hf list methods"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from apart_hf.config.recipes import RECIPES
from apart_hf.data import DATASETS
from apart_hf.hub.model_folder import WEIGHTS, Exported, model_cards_folder
from apart_hf.hub.pretrained import list_pretrained
from apart_hf.strategies.methods import METHODS
from apart_hf.utils.command_line import Parser, run_command
from apart_hf.utils.text_table import text_table


def main(arguments: list[str] | None = None, *, prog: str | None = None) -> None:
    """Exit with code 0, or 2 where what is asked for is not known."""
    run_command(lambda prog: print(_tables(_arguments(arguments, prog).kinds)), prog=prog)


def _arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = Parser(prog=prog, description="Show the names that the other commands take.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)} [all]")
    found = parser.parse_args(arguments)
    for kind in found.kinds:
        if kind not in KINDS:
            parser.error(f"there is no list of {kind!r}: choose from {', '.join(KINDS)}")
    return found


def _tables(kinds: list[str]) -> str:
    """Write a table of each kind, all of them where none is named."""
    parts = []
    for kind in kinds or KINDS:
        where, rows = KINDS[kind]
        parts.append(f"{kind} ({where}):\n{text_table(rows())}")
    return "\n\n".join(parts)


def _pairs(values: Mapping[str, Any]) -> str:
    """Write hyper-parameters, but for options that are off."""
    return " ".join(
        f"{key}={value if isinstance(value, str) else format(value, 'g')}"
        for key, value in values.items()
        if not isinstance(value, bool)
    )


def _methods() -> list[dict[str, object]]:
    return [
        {
            "name": name,
            "second pass": method.summary,
            "hyper-parameters": _pairs(method.hyper_parameters()),
            "passes a step": f"{method.passes():g}",
        }
        for name, method in METHODS.items()
    ]


def _recipes() -> list[dict[str, object]]:
    return [
        {
            "name": name,
            "model": recipe["model"],
            "epochs": recipe["epochs"],
            "batch": recipe["batch_size"],
            "hyper-parameters": _pairs({k: recipe[k] for k in ("epsilon", "groups", "ratio", "rho") if k in recipe}),
            "mixup": recipe.get("mixup"),
        }
        for name, recipe in RECIPES.items()
    ]


def _datasets() -> list[dict[str, object]]:
    return [
        {
            "name": name,
            "from": f"{spec.source}, a part of it, comes with apart_hf" if spec.local else spec.path,
            "classes": spec.num_classes,
            "training images": spec.train_size,
            "evaluation images": spec.val_size,
            "pixels": spec.image_size,
        }
        for name, spec in DATASETS.items()
    ]


def _models() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name in list_pretrained():
        folder = model_cards_folder() / name
        model = Exported.read(folder)
        results = model.training.results
        rows.append(
            {
                "name": name,
                "architecture": model.config["architecture"],
                "method": model.training.method,
                "dataset": model.training.dataset,
                "classes": model.config["num_classes"],
                "top-1 (%)": None if results is None else results.top1,
                "bytes": (folder / WEIGHTS).stat().st_size,
            }
        )
    return rows


#: what is listed: where the names go, and the rows
KINDS: dict[str, tuple[str, Callable[[], list[dict[str, object]]]]] = {
    "methods": ("train --method NAME", _methods),
    "recipes": ("train --recipe NAME", _recipes),
    "datasets": ("train --dataset NAME; any Hub id user/name is taken, too", _datasets),
    "models": ("pull NAME; validate --checkpoint NAME", _models),
}

if __name__ == "__main__":
    main()
