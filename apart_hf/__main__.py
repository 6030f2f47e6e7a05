"""The command apart-hf, also python -m apart_hf: the commands behind one name, each imported when it is asked for."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

from apart_hf.errors import ApartError, unknown_name
from apart_hf.utils.command_line import run_command
from apart_hf.version import __version__

PROG = "apart-hf"


@dataclass(frozen=True)
class Command:
    """Describes one command.

    Args:
        module: in `apart_hf.cli`, whose `main` it is.
        summary: what it does, for --help.
    """

    module: str
    summary: str


COMMANDS = {
    "train": Command("train", "train a timm BatchNorm model with APART, SAM, both, or plainly"),
    "validate": Command("validate", "measure a trained model again, and compare with what it claims"),
    "push": Command("push_to_hub", "publish a run, or a folder in timm's form, on the Hub"),
    "pull": Command("pull", "fetch a released model, or a repository of the Hub, into a folder"),
    "pack": Command("pack", "write a dataset as arrays, to be read without the package datasets"),
    "reproduce": Command("reproduce", "run a table of the paper, or the study, and render it"),
    "analyse": Command("analyse", "make Figures 1 and 2 of the paper for trained models"),
    "list": Command("list", "show the methods, recipes, datasets and released models"),
}
SPELLINGS = {"push_to_hub": "push", "push-to-hub": "push", "analyze": "analyse"}  # other ones that are taken


def main(arguments: list[str] | None = None) -> None:
    """Run a command; an unknown one ends in one line and exit code 2."""
    first, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    name = SPELLINGS.get(first, first)
    if name in COMMANDS:
        importlib.import_module(f"apart_hf.cli.{COMMANDS[name].module}").main(rest, prog=f"{PROG} {name}")
    else:
        run_command(lambda prog: print(_answer(first)), prog=PROG)


def _answer(first: str) -> str:
    """Return what is said where no command is named.

    Raises:
        ApartError: where nothing, or no option either, is named.
    """
    if first in ("-h", "--help"):
        return _help()
    if first == "--version":
        return f"{PROG} {__version__}"
    if not first:
        raise ApartError(f"name a command: {', '.join(COMMANDS)}; --help says what each does.")
    raise unknown_name("command", first, COMMANDS, "--help says what each does.")


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            f"usage: {PROG} [-h] [--version] COMMAND ...",
            "",
            "APART: adversarially perturbed batch normalisation for any timm BatchNorm model.",
            "",
            "commands:",
            *(f"  {name:{width}}{command.summary}" for name, command in COMMANDS.items()),
            "",
            f"{PROG} COMMAND --help lists the options of a command. On several processes:",
            "accelerate launch -m apart_hf train ...",
        ]
    )


if __name__ == "__main__":
    main()
