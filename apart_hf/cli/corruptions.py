"""The figure of corrupted images: apart-hf analyse corruptions --checkpoint A --checkpoint B --dataset D"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np
from accelerate import Accelerator
from timm.data import resolve_model_data_config

from apart_hf.cli.analysis_output import data_name, model_labels, new_files
from apart_hf.cli.image_options import add_image_options, measured_images
from apart_hf.data.transforms import eval_transform
from apart_hf.errors import unknown_name
from apart_hf.hub.pretrained import load_pretrained
from apart_hf.paper.corruption_figures import plot_corruptions, render_corruptions
from apart_hf.paper.corruption_robustness import Contender, CorruptionTest, Robustness, as_record, readable_rows
from apart_hf.paper.corruptions import corruption_names
from apart_hf.paper.recalibration import has_running_statistics
from apart_hf.utils.command_line import at_least
from apart_hf.utils.environment import device_name, versions

SEVERITIES = [1, 2, 3, 4, 5]


def add_corruptions(commands: Any, checkpoint: str) -> None:
    """Add the figure to those of the command.

    Args:
        commands: argparse's subparsers.
        checkpoint: what --checkpoint takes, in words.
    """
    parser = commands.add_parser("corruptions", help="accuracy on corrupted images, for any timm model")
    parser.set_defaults(run=run)
    parser.add_argument(
        "--checkpoint", required=True, action="append", metavar="NAME", help=f"{checkpoint}; repeatable"
    )
    parser.add_argument(
        "--label", action="append", metavar="TEXT", help="name of each checkpoint in the figure [its last part]"
    )
    add_image_options(parser)
    parser.add_argument(
        "--corruptions", type=_names, metavar="NAME,...", help="[the 15 common ones of Hendrycks and Dietterich, 2019]"
    )
    parser.add_argument(
        "--severities", type=_severities, default=SEVERITIES, metavar="N,...", help="of 1 to 5 [1,2,3,4,5]"
    )
    parser.add_argument(
        "--recalibrate",
        action="store_true",
        help="also measure with running statistics of BatchNorm that are estimated anew on the other half of the same "
        "corrupted images",
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="so many images, drawn at random [all]")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of all that is drawn [0]")
    parser.add_argument(
        "--output",
        default="output/analysis",
        metavar="DIR",
        help="for corruptions.md, corruptions.png and corruptions.json [output/analysis]",
    )


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))


def _severities(text: str) -> list[int]:
    found = sorted({int(part) for part in text.split(",")})
    if not set(found) <= set(SEVERITIES):
        raise argparse.ArgumentTypeError(f"{text}: must be numbers from 1 to 5")
    return found


def run(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Measure the models, and write table, picture and numbers.

    Raises:
        ApartError: where the package that corrupts images is missing, or models, data and options do not fit.
    """
    names, known = corruption_names(), corruption_names(common=False)
    if args.corruptions is not None:
        names = args.corruptions
        for name in names:
            if name not in known:
                raise unknown_name("corruption", name, known)
    labels = model_labels(args)
    with new_files(args, "md", "png", "json") as (table, picture, numbers):
        test = _test(args, labels, [(name, severity) for name in names for severity in args.severities], accelerator)
        found = test.run()
        record = _record(args, test, found)
        text = render_corruptions(found)
        title = f"{len(test.rows)} images of {data_name(args)}, split {test.split.name}"
        table.write_text(f"{title}: top-1 accuracy in %\n\n{text}")
        plot_corruptions(found, picture, title)
        numbers.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{text}\n{title}; written: {table}, {picture} and {numbers}")


def _test(
    args: argparse.Namespace, labels: list[str], cases: list[tuple[str, int]], accelerator: Accelerator
) -> CorruptionTest:
    """Load models and images, of which a number are chosen by the seed alone."""
    contenders, split = [], None
    for label, checkpoint in zip(labels, args.checkpoint):
        model, _ = load_pretrained(checkpoint)
        if args.recalibrate and not has_running_statistics(model):
            print(
                f"{label}: no BatchNorm layer keeps running statistics; there is nothing to re-estimate.",
                file=sys.stderr,
            )
        own = measured_images(args, model).val
        split = own if split is None else split
        transform = eval_transform(resolve_model_data_config(model))
        contenders.append(Contender(label, model.to(accelerator.device), transform, own.labels()))
    assert split is not None  # the parser asks for one checkpoint or more
    chosen = np.random.default_rng(args.seed).permutation(len(split))[: args.limit]
    rows = readable_rows(split, chosen, skip_bad=args.on_bad_image == "skip")
    return CorruptionTest(contenders, split, rows, cases, args.seed, args.recalibrate, args.batch_size, args.workers)


def _record(args: argparse.Namespace, test: CorruptionTest, found: list[Robustness]) -> dict[str, Any]:
    return {
        "data": data_name(args),
        "split": test.split.name,
        "images": len(test.rows),
        "rows": test.rows.tolist(),
        "corruptions": list(dict.fromkeys(name for name, _ in test.corruptions)),
        "severities": list(args.severities),
        "seed": args.seed,
        "recalibrate": args.recalibrate,
        "batch_size": args.batch_size,
        "device": device_name(),
        "versions": versions(),
        "models": [{"checkpoint": checkpoint, **one} for checkpoint, one in zip(args.checkpoint, as_record(found))],
    }
