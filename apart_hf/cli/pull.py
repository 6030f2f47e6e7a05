"""The command that fetches a model: apart-hf pull user/name FOLDER"""

from __future__ import annotations

import argparse
from pathlib import Path

from apart_hf.hub.model_folder import read_config
from apart_hf.hub.pull import pull
from apart_hf.models import is_registered_here
from apart_hf.utils.command_line import Parser, run_command


def main(arguments: list[str] | None = None, *, prog: str | None = None) -> None:
    """Exit with code 0 when all is there, 2 with one line where not."""
    run_command(lambda prog: _run(_arguments(arguments, prog)), prog=prog)


def _arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = Parser(prog=prog, description="Fetch a model into a folder that timm loads.")
    parser.add_argument("name", metavar="NAME", help="a model that comes with apart_hf, or a repository user/name")
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="is made [the model's name, here]")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a repository [main]")
    return parser.parse_args(arguments)


def _run(args: argparse.Namespace) -> None:
    folder = pull(args.name, args.folder, revision=args.revision)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        print(f"  {file.relative_to(folder)}  {file.stat().st_size:,} bytes")
    ours = "import apart_hf and " if is_registered_here(read_config(folder)["architecture"]) else ""
    print(f"{args.name} is in {folder}. Load it with {ours}timm.create_model('local-dir:{folder}', pretrained=True)")


if __name__ == "__main__":
    main()
