"""The command line of a training, made from `TrainConfig`, and how its layers of settings are joined."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from apart_hf.config.recipes import recipe
from apart_hf.config.train_config import HYPER_PARAMETERS, TrainConfig
from apart_hf.config.yaml_file import read_config
from apart_hf.errors import ApartError
from apart_hf.utils.command_line import Parser


def parse_arguments(arguments: list[str] | None = None, *, prog: str | None = None) -> TrainConfig:
    """The command line as a `TrainConfig`: flags before the file of --config before --recipe before defaults.

    Exits with code 2 and one line where the command line cannot be read.

    Raises: ApartError for a value out of range, or a file or recipe that is not there.
    """
    parser = Parser(
        prog=prog,
        description="Train any timm BatchNorm model with APART, SAM, both, or plainly.",
        epilog="Defaults in [] depend on other settings.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    options = dataclasses.fields(TrainConfig)
    for option in options:
        title = option.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        arguments_of = dict(option.metadata["arguments"])
        flags = (f"--{option.name.replace('_', '-')}", *arguments_of.pop("flags", ()))
        help = option.metadata["help"].replace("%", "%%")
        if option.default is False:
            arguments_of["action"] = argparse.BooleanOptionalAction
        elif option.default is not None:
            help += f" [{option.default}]"
        groups[title].add_argument(*flags, dest=option.name, help=help, **arguments_of)
    flags = vars(parser.parse_args(arguments))
    file = read_config(flags["config"], options) if flags.get("config") else {}
    name = flags.get("recipe", file.get("recipe"))
    if "recipe" in file and file["recipe"] != name:
        raise ApartError(f"--recipe {name}: {flags['config']} is of recipe {file['recipe']}; leave one of them out.")
    return TrainConfig(**_layered(recipe(name) if name else {}, file, flags))


# setting one unsets the other, which it decides
_SAME = {"amp": "amp_dtype", "lr_base": "lr", "input_size": "img_size", "img_size": "input_size"}


def _layered(*layers: dict[str, Any]) -> dict[str, Any]:
    """Later layers go before earlier ones; another method takes no hyper-parameters from the layers below it."""
    merged: dict[str, Any] = {}
    for layer in layers:
        if layer.get("method", merged.get("method")) != merged.get("method"):
            merged = {key: value for key, value in merged.items() if key not in HYPER_PARAMETERS}
        for key, partner in _SAME.items():
            if layer.get(key) and partner not in layer:
                merged.pop(partner, None)
        merged |= layer
    return merged
