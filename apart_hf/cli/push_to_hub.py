"""The command that publishes: apart-hf push FOLDER user/name"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, get_token

from apart_hf.errors import ApartError
from apart_hf.hub.publish import push
from apart_hf.hub.staging import PushOptions, published_files, stage
from apart_hf.utils.command_line import Parser, run_command
from apart_hf.utils.hub_client import attempt, check_repo_id


def main(arguments: list[str] | None = None, *, prog: str | None = None) -> None:
    """Run the command; its exit code is 0 when all is there (with --dry-run, would be), 2 with one line where not."""
    run_command(lambda prog: _run(_arguments(arguments, prog)), prog=prog)


def _arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = Parser(
        prog=prog,
        description="Publish a run, or a folder in timm's form, with its card, as one commit.",
        epilog="The token is that of hf auth login, or HF_TOKEN.",
    )
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="a run's output, or a folder timm saved")
    parser.add_argument("repo_id", nargs="?", metavar="USER/NAME", help="repository; made where it is not there")
    parser.add_argument("--all", type=Path, metavar="DIR", help="every exported folder in DIR, under its own name")
    parser.add_argument("--namespace", metavar="USER", help="of --all [that of the token]")
    parser.add_argument("--dry-run", action="store_true", help="write folder and card, list what would go up")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="push to this branch [main]")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--commit-message", metavar="TEXT")
    parser.add_argument("--compare-with", type=Path, metavar="FOLDER", help="another run, for a table of both")
    parser.add_argument("--license", metavar="NAME", help="of the weights, as the Hub spells it [as recorded]")
    found = parser.parse_args(arguments)
    one = found.folder is not None and found.repo_id is not None
    if (found.all is None) != one or (found.all is not None and found.folder is not None):
        parser.error("name FOLDER and USER/NAME, or --all DIR")
    return found


def _run(args: argparse.Namespace) -> None:
    names = [field.name for field in dataclasses.fields(PushOptions)]
    options = PushOptions(**{name: getattr(args, name) for name in names})
    with tempfile.TemporaryDirectory() as scratch:
        for folder, repo_id in _targets(args):
            if args.all is not None:  # released folders stay as they are: their cards name another repository
                folder = Path(shutil.copytree(folder, Path(scratch) / folder.name))
            if args.dry_run:
                check_repo_id(repo_id)
                staged = stage(folder, repo_id, options)
                print(f"{repo_id} would be, from {staged}:")
                for name in published_files(staged):
                    print(f"  {name}  {(staged / name).stat().st_size:,} bytes")
            else:
                print(f"{repo_id}: {push(folder, repo_id, options)}", flush=True)


def _targets(args: argparse.Namespace) -> list[tuple[Path, str]]:
    if args.all is None:
        return [(args.folder, args.repo_id)]
    folders = sorted(file.parent for file in args.all.glob("*/config.json"))
    if not folders:
        raise ApartError(f"--all {args.all}: no folder in it has a config.json.")
    namespace = args.namespace
    if namespace is None:
        if get_token() is None:
            raise ApartError("--all needs --namespace, or a token for the Hub (hf auth login, or HF_TOKEN).")
        namespace = attempt(HfApi().whoami, "the account")["name"]
    return [(folder, f"{namespace}/{folder.name}") for folder in folders]


if __name__ == "__main__":
    main()
