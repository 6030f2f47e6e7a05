"""The command that makes figures of trained models: apart-hf analyse attack --checkpoint user/name"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from apart_hf.cli.analysis_output import data_name, model_labels, new_files
from apart_hf.cli.corruptions import add_corruptions
from apart_hf.cli.image_options import add_image_options, measured_images, plain_batches
from apart_hf.data import Loaders
from apart_hf.errors import ApartError
from apart_hf.hub.pretrained import load_pretrained
from apart_hf.paper.bn_robustness import Batches, attack, robustness
from apart_hf.paper.figures import plot_attack, plot_robustness
from apart_hf.utils.accelerator import start_accelerator
from apart_hf.utils.allocator import keep_freed_memory
from apart_hf.utils.command_line import Parser, at_least, run_command
from apart_hf.utils.processes import use_threads
from apart_hf.utils.progress_bar import progress_bar

RADII = "0,0.02,0.05,0.1,0.15,0.2,0.3,0.4"


def main(arguments: list[str] | None = None, *, prog: str | None = None) -> None:
    """Run the command; its exit code is 0, or 2 for bad input."""
    run_command(lambda prog: _run(_arguments(arguments, prog)), prog=prog)


def _list_of(kind: Callable[[str], Any], least: float) -> Callable[[str], list]:
    """Make a type for argparse: numbers from `least` to 2**31 - 1 between commas; each once, in order."""

    def numbers(text: str) -> list:
        found = sorted({kind(part) for part in text.split(",")})
        if not all(least <= value < 2**31 for value in found):  # NaN is refused too
            raise argparse.ArgumentTypeError(f"{text}: must be finite and from {least} to {2**31 - 1}")
        return found

    return numbers


def _arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = Parser(
        prog=prog, description="Accuracy of trained models under perturbed BN statistics, and on corrupted images."
    )
    commands = parser.add_subparsers(metavar="FIGURE", dest="figure", required=True)
    one = commands.add_parser("attack", help="Figure 1: training accuracy after APART's attack by one batch")
    many = commands.add_parser("robustness", help="Figure 2: test accuracy with scaled running statistics")
    one.set_defaults(run=_figure, measure=_attack, plot=plot_attack, only="train", label=None)
    many.set_defaults(run=_figure, measure=_robustness, plot=plot_robustness, only="val")
    what = "a run or exported folder, a repository user/name, or a model that comes with apart_hf"
    add_corruptions(commands, what)
    one.add_argument("--checkpoint", required=True, nargs=1, metavar="NAME", help=what)
    one.add_argument(
        "--groups",
        type=_list_of(int, 1),
        default="1,2,4,8,16",
        metavar="N,...",
        help="groups of a batch that are normalised apart [1,2,4,8,16]",
    )
    many.add_argument("--checkpoint", required=True, action="append", metavar="NAME", help=f"{what}; repeatable")
    many.add_argument(
        "--label", action="append", metavar="TEXT", help="name of each checkpoint in the figure [its last part]"
    )
    for command, split, draws in ((one, "--train-split", 3), (many, "--val-split", 1)):
        add_image_options(command, split)
        command.add_argument("--images", type=at_least(1), metavar="N", help="so many of them, drawn at random [all]")
        command.add_argument(
            "--epsilons", type=_list_of(float, 0), default=RADII, metavar="X,...", help=f"radii [{RADII}]"
        )
        command.add_argument(
            "--draws", type=at_least(1), default=draws, metavar="N", help=f"random perturbations, averaged [{draws}]"
        )
        command.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of all that is drawn [0]")
        command.add_argument(
            "--output", default="output/analysis", metavar="DIR", help="for FIGURE.png and FIGURE.csv [output/analysis]"
        )
    return parser.parse_args(arguments)


def _attack(args: argparse.Namespace, model: nn.Module, batches: Batches) -> list[dict[str, Any]]:
    return attack(
        model,
        batches,
        batch_size=args.batch_size,
        epsilons=args.epsilons,
        groups=args.groups,
        draws=args.draws,
        seed=args.seed,
    )


def _robustness(args: argparse.Namespace, model: nn.Module, batches: Batches) -> list[dict[str, Any]]:
    return robustness(model, batches, epsilons=args.epsilons, draws=args.draws, seed=args.seed)


def _run(args: argparse.Namespace) -> None:
    if not args.no_mallopt:
        keep_freed_memory()
    accelerator = start_accelerator(mixed_precision="no")
    if accelerator.num_processes > 1:
        raise ApartError(f"{accelerator.num_processes} processes were started, and one measures; leave the launcher.")
    use_threads(None, 1)
    args.run(args, accelerator)


def _figure(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Make Figure 1 or 2."""
    labels = model_labels(args)
    with new_files(args, "csv", "png") as (table, picture):
        rows = _measured(args, labels, accelerator)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    images = rows[0]["images"]
    args.plot(rows, picture, f"{images} images of {data_name(args)}")
    print(f"{images} images, {len(rows)} accuracies; written: {table} and {picture}")


def _measured(args: argparse.Namespace, labels: list[str], accelerator: Accelerator) -> list[dict[str, Any]]:
    """Measure all models, and return their rows."""
    rows = []
    for label, checkpoint in zip(labels, args.checkpoint):
        model, batches = _load(args, checkpoint, accelerator)
        progress = progress_bar(batches, label, unit="batch")
        rows += [{"model": label, **row} for row in args.measure(args, model, progress)]
    return rows


def _load(args: argparse.Namespace, checkpoint: str, accelerator: Accelerator) -> tuple[nn.Module, DataLoader]:
    """Load a model, and its images in an order that depends on the seed alone."""
    model, _ = load_pretrained(checkpoint)
    data = measured_images(args, model, only=args.only)
    chosen = np.random.default_rng(args.seed).permutation(len(data.val))[: args.images]
    loader = Loaders(data, plain_batches(args, model), accelerator).evaluation(data.val.part(chosen))
    return model.to(accelerator.device), loader


if __name__ == "__main__":
    main()
