"""The command that trains: apart-hf train --model resnet18 --method apart"""

from __future__ import annotations

import dataclasses
import sys

from apart_hf.config.arguments import parse_arguments
from apart_hf.config.checks import check_names
from apart_hf.config.defaults import fill_defaults
from apart_hf.config.train_config import TrainConfig
from apart_hf.config.yaml_file import write_config
from apart_hf.utils.command_line import run_command
from apart_hf.utils.processes import rank
from apart_hf.utils.said_once import is_first_to_say


def main(arguments: list[str] | None = None, *, prog: str | None = None) -> None:
    """Run the command; bad input ends in one line on stderr and exit code 2."""
    run_command(lambda prog: _run(parse_arguments(arguments, prog=prog)), prog=prog)


def _run(config: TrainConfig) -> None:
    if config.print_config:
        check_names(config)
        print(write_config(dataclasses.asdict(fill_defaults(config))), end="")
        return
    # they take as long as torch and timm, which --help and a misspelt flag need not, and refuse what is no POSIX system
    from apart_hf.runs.interruption import EXIT_CODE, Interrupted, ProcessLost
    from apart_hf.runs.train import train

    try:
        train(config)
    except Interrupted as stopped:
        if isinstance(stopped, ProcessLost) or is_first_to_say("stopped"):  # each in other words
            process = f"process {rank()}: " if rank() else ""
            print(f"{process}{stopped} To go on: the same command with --resume auto.", file=sys.stderr)
        sys.exit(EXIT_CODE)


if __name__ == "__main__":
    main()
