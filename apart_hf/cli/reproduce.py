"""The command that reproduces a table: apart-hf reproduce table1 --rows standard,apart --seeds 5"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from apart_hf.errors import ApartError
from apart_hf.paper.request import TableRequest
from apart_hf.paper.scales import SCALES
from apart_hf.paper.tables import ROWS, TABLES
from apart_hf.utils.command_line import Parser, run_command


def main(arguments: list[str] | None = None, *, prog: str | None = None) -> None:
    """Run the command; its exit code is 2, with one line, for bad input, and 75 after a stop that can be resumed."""
    run_command(lambda prog: _run(_arguments(arguments, prog)), prog=prog)


def _run(args: argparse.Namespace) -> None:
    request = request_of(args)
    # as in cli/train: not before the command line has been read, and refused here where there is no POSIX
    from apart_hf.paper.render import render_table
    from apart_hf.paper.reproduce import jobs_left, reproduce
    from apart_hf.runs.interruption import EXIT_CODE, Interrupted

    if args.dry_run:
        for job in jobs_left(request):
            print(shlex.join(["apart-hf", "train", *job.arguments]))
        return
    try:
        print(render_table(request) if args.render else reproduce(request), flush=True)
    except Interrupted as stopped:
        print(f"{stopped} To go on: the same command.", file=sys.stderr)
        sys.exit(EXIT_CODE)


def request_of(args: argparse.Namespace) -> TableRequest:
    """Make a `TableRequest` of the arguments.

    Raises:
        ApartError: where they are none.
    """
    part, slash, parts = args.shard.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal()):
        raise ApartError(f"--shard {args.shard!r}: I/K with 1 <= I <= K, for instance 2/3.")
    try:
        launcher = shlex.split(args.launcher)
    except ValueError as error:
        raise ApartError(f"--launcher {args.launcher!r}: {error}.") from error
    return TableRequest(
        args.table,
        args.dataset,
        args.model,
        None if args.rows is None else tuple(args.rows.split(",")),
        args.seeds,
        args.scale,
        args.data_dir,
        int(part) - 1,
        int(parts),
        args.results,
        args.output,
        tuple(launcher),
        tuple(args.more),
        args.time_limit,
    )


def _arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = Parser(
        prog=prog,
        description="Run a table's rows and render it. What is there already is not run again.",
        epilog="After --: flags of `train` for every run, for instance -- --channels-last --amp-dtype bfloat16.",
    )
    parser.add_argument("table", choices=TABLES, help="of the paper; study: what the parts of a method are worth")
    parser.add_argument("--dataset", metavar="NAME", help="[the table's first]")
    parser.add_argument("--model", metavar="NAME", help="of the table's column [its first]")
    parser.add_argument("--rows", metavar="NAME,...", help="[all]: " + ", ".join(ROWS))
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N-1 of each row [5]")
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="full",
        help="; ".join(f"{name}: {scale.summary}" for name, scale in SCALES.items()) + " [full]",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="local folder with the dataset")
    parser.add_argument("--shard", default="1/1", metavar="I/K", help="the I-th of K parts of the runs [1/1]")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="all *.jsonl in it are read; new results and the table go there [results]",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/reproduce"),
        metavar="DIR",
        help="folder of the runs [output/reproduce]",
    )
    parser.add_argument(
        "--launcher",
        default=sys.executable,
        metavar="COMMAND",
        help='starts a run, for instance "accelerate launch --multi_gpu"; the batch size is that of a '
        "process [this Python]",
    )
    parser.add_argument(
        "--time-limit",
        metavar="N[s|m|h]",
        help="stop all runs at a checkpoint before so much time has passed since this process was started, with exit "
        "code 75; the same command goes on [none]",
    )
    parser.add_argument("--render", action="store_true", help="only render what is there")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only print the commands of what is left to run; a part "
        "of a dataset, which a scale may take, is made by the first run",
    )
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    found = parser.parse_args(arguments[:cut])
    found.more = arguments[cut + 1 :]
    return found


if __name__ == "__main__":
    main()
