"""Commands, flags and code of documents, and the parsers that they are meant for."""

import contextlib
import importlib
import io
import re
import shlex

import pytest

from apart_hf.__main__ import COMMANDS, SPELLINGS
from apart_hf.config.arguments import parse_arguments
from tests.support.helpers import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))
COMMAND = re.compile(r"(?:\bapart-hf|-m apart_hf) (\w+)|scripts/(train|validate|reproduce|analyse|push_to_hub)\.py")
FIGURES = ("attack", "robustness", "corruptions")


def blocks(text, language):
    """The code of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def commands(text):
    """(name, arguments) of every command of ours that is shown; what a shell puts in is put in."""
    shown = re.sub(r"\\\n\s*", " ", "\n".join(blocks(text, "bash")))
    shown = re.sub(r"\$\w+", "apart", re.sub(r"\$\(\(.*?\)\)", "570", shown))
    for line in shown.splitlines():
        if found := COMMAND.search(line):
            name = found[1] or found[2]
            words = shlex.split(line[found.end() :].split("||")[0], comments=True)
            yield SPELLINGS.get(name, name), words


INLINE = re.compile(r"`((?:accelerate launch (?:--\w+ \d+ )*-m apart_hf|python -m apart_hf|apart-hf) \w+[^`]*)`")
FILLED = {"FOLDER", "RUN", "PART", "OUT", "DIR"}  # places for what any name fills


def inline_commands(text):
    """(name, arguments) of our commands within sentences, but for bare names and those with a place for a number."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M).replace("-METHOD", "-apart")
    for code in INLINE.findall(prose):
        found, words = COMMAND.search(code), shlex.split(code)
        places = {word for word in words if re.fullmatch(r"[A-Z][A-Z0-9/]*", word)} - FILLED
        arguments = shlex.split(code[found.end() :])
        if arguments and "..." not in words and not places:
            yield SPELLINGS.get(found[1], found[1]), arguments


def parse(name, arguments, folder, monkeypatch):
    """Read a command as far as it goes without working: a run of tables is made dry, in a folder."""
    if name == "train":
        return parse_arguments(arguments)
    module = importlib.import_module(f"apart_hf.cli.{COMMANDS[name].module}")
    if name == "reproduce":
        place = arguments.index("--") if "--" in arguments else len(arguments)
        return module.main([*arguments[:place], "--dry-run", "--results", str(folder), *arguments[place:]])
    if name == "list":
        return module.main(arguments)
    read = []
    monkeypatch.setattr(module, "_run", read.append)
    module.main(arguments)
    (args,) = read
    return args


def known_flags():
    """Every flag of our commands."""
    mains = [importlib.import_module(f"apart_hf.cli.{command.module}").main for command in COMMANDS.values()]
    calls = [*((main, []) for main in mains), *((mains[list(COMMANDS).index("analyse")], [name]) for name in FIGURES)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for main, arguments in calls:
            with pytest.raises(SystemExit):
                main([*arguments, "--help"])
    return set(re.findall(r"--[a-z][a-z0-9-]+", said.getvalue()))


def named_flags(text):
    """The flags that prose names, but for those within commands of other programs."""
    prose = re.sub(
        r"^```.*?^```|`(?:\w+=\w+ )*(?:python|pip|accelerate|torchrun|\./)[^`]*`", "", text, flags=re.S | re.M
    )
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", prose))


def paragraphs(text):
    """The paragraphs and items of lists; no code, no tables, no headings, and links without their targets."""
    prose = re.sub(r"^```.*?^```|^\|[^\n]*$|^#[^\n]*$|<!--.*?-->", "", text, flags=re.S | re.M)
    prose = re.sub(r"\]\([^)]*\)", "]", re.sub(r"^(?=- |\d+\. )", "\n", prose, flags=re.M))
    return [part for part in re.split(r"\n\s*\n", prose) if part.strip()]
