"""The command that packs a dataset into arrays: apart-hf pack OUT --dataset cifar100"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from apart_hf.cli.dataset_options import add_dataset_options
from apart_hf.data import DATASETS, DataSettings, load_image_data
from apart_hf.data.packed import CLASSES
from apart_hf.errors import ApartError
from apart_hf.utils.command_line import Parser, at_least, run_command


def main(arguments: list[str] | None = None, *, prog: str | None = None) -> None:
    """Run the command; its exit code is 0, or 2 for bad input."""
    run_command(lambda prog: _run(_arguments(arguments, prog)), prog=prog)


def _arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = Parser(
        prog=prog,
        description="Write a dataset as arrays of decoded images, which --data-dir reads without the package datasets.",
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help=f"new folder, with SPLIT/images-N.npy, SPLIT/labels.npy and {CLASSES}"
    )
    add_dataset_options(parser)
    parser.add_argument("--train-split", metavar="NAME", help="split to train on [found]")
    parser.add_argument("--val-split", metavar="NAME", help="split to evaluate on [found]")
    parser.add_argument(
        "--val-fraction", type=float, metavar="X", help="evaluate on a share of the training split, as in a training"
    )
    parser.add_argument("--seed", type=at_least(0, 2**32 - 2), default=0, metavar="N", help="of that share [0]")
    parser.add_argument("--class-map", metavar="FILE", help="class names by index, one a line [the dataset's]")
    parser.add_argument(
        "--size",
        type=at_least(1, 4096),
        metavar="N",
        help="cut a square from the middle of every image, and resize it to N pixels [images keep their size]",
    )
    return parser.parse_args(arguments)


def _run(args: argparse.Namespace) -> None:
    from apart_hf.data.packing import pack

    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise ApartError(f"--val-fraction {args.val_fraction}: a share between 0 and 1.")
    skip_bad = args.on_bad_image == "skip"
    data = load_image_data(
        DataSettings(
            args.dataset,
            args.dataset_config,
            args.data_dir,
            args.train_split,
            args.val_split,
            args.input_key,
            args.target_key,
            class_map=args.class_map,
            val_fraction=args.val_fraction,
            seed=args.seed,
            skip_bad=skip_bad,
        )
    )
    for split in pack(data, args.out, size=args.size, skip_bad=skip_bad):
        left_out = f", {split.skipped} left out that cannot be decoded" if split.skipped else ""
        print(
            f"split {split.name}: {split.images:,} images of {split.size[0]}x{split.size[1]} pixels in {split.parts} "
            f"file(s), {split.bytes / 1e6:.1f} MB{left_out}"
        )
    name = ["--dataset", args.dataset] if args.dataset in DATASETS and args.dataset != "demo" else []
    command = shlex.join(["apart-hf", "train", *name, "--data-dir", str(args.out)])
    print(f"{len(data.class_names)} classes -> {args.out}. Train on it: {command}")


if __name__ == "__main__":
    main()
