"""The command line of a training, made from `TrainConfig`, and how its layers of settings are joined."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from apart_hf.config.recipes import recipe
from apart_hf.config.setting import Setting
from apart_hf.config.timm_flags import refusal
from apart_hf.config.train_config import HYPER_PARAMETERS, SETTINGS, TrainConfig
from apart_hf.config.yaml_file import read_config
from apart_hf.errors import ApartError
from apart_hf.utils.command_line import Parser


def parse_arguments(arguments: list[str] | None = None, *, prog: str | None = None) -> TrainConfig:
    """Read the command line: flags go before the file of --config, that before --recipe, that before defaults.

    Exits with code 2 and one line where the command line cannot be read.

    Raises:
        ApartError: for a value out of range, or a file or recipe that is not there.
    """
    parser = Parser(
        prog=prog,
        description="Train any timm BatchNorm model with APART, SAM, both, or plainly.",
        epilog="Defaults in [] depend on other settings.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    for setting in SETTINGS.values():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        groups[setting.group].add_argument(setting.flag, *setting.flags, dest=setting.name, **_argument(setting))
    arguments = sys.argv[1:] if arguments is None else arguments
    reason = refusal(arguments, {flag for setting in SETTINGS.values() for flag in (setting.flag, *setting.flags)})
    if reason is not None and not {"-h", "--help"} & set(arguments):
        parser.error(reason)
    flags = vars(parser.parse_args(arguments))
    file = read_config(flags["config"]) if flags.get("config") else {}
    name = flags.get("recipe", file.get("recipe"))
    if "recipe" in file and file["recipe"] != name:
        raise ApartError(f"--recipe {name}: {flags['config']} is of recipe {file['recipe']}; leave one of them out.")
    return TrainConfig(**_layered(recipe(name) if name else {}, file, flags))


def _argument(setting: Setting) -> dict[str, Any]:
    """Return what argparse is told of a setting, beside its flags."""
    help = setting.help.replace("%", "%%")
    if setting.kind is bool and setting.name.startswith("no_"):
        return {"help": help, "action": "store_true"}  # argparse would take its own flag for the opposite
    if setting.kind is bool:
        return {"help": help, "action": argparse.BooleanOptionalAction}
    return {
        "help": help if setting.default is None else f"{help} [{setting.default}]",
        "type": setting.kind,
        "metavar": setting.metavar or {int: "N", float: "X"}.get(setting.kind),
        "nargs": (setting.length or "+") if setting.many else None,
        "choices": setting.choices or None,
    }


def _layered(*layers: dict[str, Any]) -> dict[str, Any]:
    """Join layers: later ones go before earlier; another method takes no hyper-parameters from the layers below it."""
    merged: dict[str, Any] = {}
    for layer in layers:
        if layer.get("method", merged.get("method")) != merged.get("method"):
            merged = {key: value for key, value in merged.items() if key not in HYPER_PARAMETERS}
        for setting in SETTINGS.values():
            if setting.decides is not None and layer.get(setting.name) and setting.decides not in layer:
                merged.pop(setting.decides, None)
        merged |= layer
    return merged
