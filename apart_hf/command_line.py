"""Command lines: what all of them share, and that of a run, made from `TrainConfig`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from apart_hf.config import HYPER_PARAMETERS, TrainConfig
from apart_hf.config_file import read_config
from apart_hf.errors import ApartError, OneProcessError, one_line
from apart_hf.output import forgiving_output
from apart_hf.recipes import recipe
from apart_hf.runtime import rank


class Parser(argparse.ArgumentParser):
    """Bad input ends in one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the options)\n")


def at_least(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """A type for argparse: whole numbers from `least` to `most`."""

    def integer(text: str) -> int:
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text}: must be from {least} to {most}")
        return int(text)

    return integer


def run_command(command: Callable[[str], object]) -> None:
    """Run `command(prog)`; an ApartError ends in one line on stderr and exit code 2.

    The line is that of the first process, or of the one that met the error.
    """
    prog = Path(sys.argv[0]).name
    try:
        with forgiving_output():
            command(prog)
    except ApartError as error:
        if rank() == 0 or isinstance(error, OneProcessError):
            process = f"process {rank()}: " if rank() else ""
            print(f"{prog}: error: {process}{one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(2)


def parse_arguments(arguments: list[str] | None = None, *, prog: str | None = None) -> TrainConfig:
    """The command line as a `TrainConfig`: flags before the file of --config before --recipe before defaults.

    Exits with code 2 and one line where the command line cannot be read.

    Raises: ApartError for a value out of range, or a file or recipe that is not there.
    """
    parser = Parser(
        prog=prog, description="Train any timm BatchNorm model with APART, SAM, both, or plainly.",
        epilog="Defaults in [] depend on other settings.", allow_abbrev=False, argument_default=argparse.SUPPRESS,
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
