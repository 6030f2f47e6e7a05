#!/usr/bin/env python
"""Write the tables of documents that the code decides: options, recipes, datasets, methods, models, commands, names.

    python scripts/document_tables.py
    python scripts/document_tables.py --check

A document has a place between `<!-- table: NAME -->` and `<!-- table ends -->` for each. --check writes nothing, and
ends with exit code 2 where one is out of date.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from apart_hf import __all__ as exported
from apart_hf.__main__ import COMMANDS
from apart_hf.cli import list as list_command
from apart_hf.config.setting import Setting
from apart_hf.config.train_config import SETTINGS
from apart_hf.data import DATASETS
from apart_hf.errors import ApartError, unknown_name
from apart_hf.utils.command_line import Parser, run_command
from apart_hf.utils.files import write_whole
from apart_hf.utils.text_table import markdown_table

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"(?P<begin><!-- table: (?P<name>\S+) -->\n).*?(?P<end><!-- table ends -->)", re.DOTALL)
INTEGRATIONS = (
    *(f"transformers.{name}" for name in ("ApartTrainer", "ApartTrainingArguments", "ApartMixin")),
    "lightning.Apart",
    "timm.apart",
)
PUBLIC = (
    *(f"apart_hf.{name}" for name in exported if name not in ("__version__", "MethodName")),
    *(f"apart_hf.integrations.{name}" for name in INTEGRATIONS),
)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Write rows without columns that are empty, and without padding: a longer cell then changes its own line alone."""
    rows = [
        {name: value for name, value in row.items() if any(r[name] not in ("", None) for r in rows)} for row in rows
    ]
    return re.sub(r" {2,}", " ", re.sub(r"-{4,}", "---", markdown_table(rows)))


def options(document: Path) -> str:
    """Write a table of settings for each group of --help."""
    groups: dict[str, list[Setting]] = {}
    for setting in SETTINGS.values():
        groups.setdefault(setting.group, []).append(setting)
    parts = [f"\n## {name.capitalize()}\n\n{table(list(map(_option, of)))}" for name, of in groups.items()]
    return "".join(parts) + "\n"


def _option(setting: Setting) -> dict[str, object]:
    resumed = {"free": "yes", "override": "override", "fixed": "no"}
    # what a default depends on stands in brackets, as in --help
    text = re.sub(r"(?<!in )\[(.*?)\]", r"(default: \1)", setting.help).replace("*", r"\*").replace("<", "&lt;")
    return {
        "flag": ", ".join(f"`{flag}`" for flag in (setting.flag, *setting.flags)),
        "takes": _taken(setting),
        "default": _default(setting.default),
        "what it does": text,
        "on resuming": resumed[setting.on_resume],
    }


def _taken(setting: Setting) -> str:
    if setting.kind is bool:
        return "nothing"
    if setting.choices:
        return ", ".join(f"`{choice}`" for choice in setting.choices)
    one = setting.metavar or {int: "a whole number", float: "a number"}.get(setting.kind, "text")
    if not setting.many:
        return one
    return f"{one}, several" if setting.length is None else f"{one}, {setting.length} of them"


def _default(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "", False: "off", True: "on"}[value]
    return f"`{value}`"


def methods(document: Path) -> str:
    """Write what methods there are; a name leads to its card, where there is one."""
    rows = []
    for row in list_command.KINDS["methods"][1]():
        name = str(row["name"])
        card = ROOT / "docs/methods" / f"{name}.md"
        link = f"[`{name}`]({os.path.relpath(card, document.parent)})" if card.exists() else f"`{name}`"
        rows.append(row | {"name": link})
    return table(rows)


def recipes(document: Path) -> str:
    """Write the recipes of the paper's settings."""
    return table([row | {"name": f"`{row['name']}`"} for row in list_command.KINDS["recipes"][1]()])


def models(document: Path) -> str:
    """Write the trained models that come with the package."""
    return table([row | {"name": f"`{row['name']}`"} for row in list_command.KINDS["models"][1]()])


def datasets(document: Path) -> str:
    """Write where each dataset is found, and what is in it."""
    return table(
        [
            {
                "`--dataset`": f"`{name}`",
                "Hub id (configuration)": "bundled"
                if spec.local
                else f"`{spec.path}`" + (f" ({spec.config})" if spec.config else ""),
                "splits": f"{spec.train_split}, {spec.val_split}",
                "columns": f"{spec.input_key}, {spec.target_key}",
                "classes": spec.num_classes,
                "image size": spec.image_size,
                "images": f"{spec.train_size:,} + {spec.val_size:,}",
            }
            for name, spec in DATASETS.items()
        ]
    )


def commands(document: Path) -> str:
    """Write what commands there are."""
    return table(
        [{"command": f"`apart-hf {name}`", "what it does": command.summary} for name, command in COMMANDS.items()]
    )


def names(document: Path) -> str:
    """Write what is public, in a sentence each."""
    rows = []
    for dotted in PUBLIC:
        module, _, name = dotted.rpartition(".")
        value = getattr(importlib.import_module(module), name)
        text = inspect.getdoc(value) if callable(value) else "Has the methods by name; each is a `Method`."
        rows.append({"name": f"`{dotted}`", "what it does": (text or "").split("\n\n")[0].replace("\n", " ")})
    return table(rows)


def reference(document: Path) -> str:
    """Write where the site shows the docstring of each public name; a forge shows nothing there."""
    return "\n" + "".join(f"<!-- ::: {dotted} -->\n\n" for dotted in PUBLIC)


TABLES: Mapping[str, Callable[[Path], str]] = {
    function.__name__: function
    for function in (options, methods, recipes, models, datasets, commands, names, reference)
}


def rendered(document: Path) -> str:
    """Return the text of a document with its tables as the code has them.

    Raises:
        ApartError: where a place names a table that there is none of.
    """

    def written(place: re.Match[str]) -> str:
        if place["name"] not in TABLES:
            raise unknown_name(f"table in {document}", place["name"], TABLES)
        return f"{place['begin']}\n{TABLES[place['name']](document).strip()}\n\n{place['end']}"

    return PLACE.sub(written, document.read_text())


def main() -> None:
    """Write the tables, or say which are out of date."""
    run_command(_run)


def _run(prog: str) -> None:
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = [file for file in sorted((ROOT / "docs").rglob("*.md")) if rendered(file) != file.read_text()]
    if check and stale:
        raise ApartError(f"{', '.join(file.name for file in stale)}: out of date; run {prog} without --check.")
    for file in stale:
        write_whole(file, rendered(file))
        print(f"wrote {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
