"""The command that measures a trained model again: apart-hf validate --checkpoint user/name --dataset demo"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from apart_hf.cli.image_options import add_image_options, measured_images, plain_batches
from apart_hf.data import Loaders
from apart_hf.data.dataset_names import without_prefix
from apart_hf.data.split_names import same_split
from apart_hf.hub.model_folder import Exported
from apart_hf.hub.pretrained import find_pretrained, load_pretrained
from apart_hf.hub.training_record import DataRecord, TrainingRecord
from apart_hf.training.evaluation import evaluate
from apart_hf.training.loader_reports import count_skipped
from apart_hf.utils.accelerator import start_accelerator
from apart_hf.utils.allocator import keep_freed_memory
from apart_hf.utils.command_line import Parser, run_command
from apart_hf.utils.processes import use_threads

TOLERANCE = 0.05  # per cent of top-1: another machine rounds otherwise


def main(arguments: list[str] | None = None, *, prog: str | None = None) -> None:
    """Run the command; its exit code is 0 where the claim holds or there is none, 1 where not, 2 for bad input."""
    run_command(lambda prog: _run(_arguments(arguments, prog)), prog=prog)


def _arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = Parser(prog=prog, description="Measure a trained model again, and compare with what it claims.")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="NAME",
        help="a run or exported folder, a repository user/name, or a model that comes with apart_hf",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a repository")
    add_image_options(parser)
    parser.add_argument("--streaming", action="store_true", help="read images as they come")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(arguments)


def _run(args: argparse.Namespace) -> None:
    if not args.no_mallopt:
        keep_freed_memory()
    folder = find_pretrained(args.checkpoint, revision=args.revision)
    model, _ = load_pretrained(args.checkpoint, revision=args.revision)
    training = Exported.read(folder).training
    # in the arithmetic of the run, which moves the accuracy by tenths
    precision = {"bfloat16": "bf16", "float16": "fp16" if torch.cuda.is_available() else "no"}.get(
        training.settings.get("amp_dtype", "float32"), "no"
    )
    accelerator = start_accelerator(mixed_precision=precision, dynamo_backend="no")
    use_threads(None, accelerator.num_processes)
    data = measured_images(args, model, streaming=args.streaming)
    for note in data.notes:
        print(f"data: {note}.", file=sys.stderr)
    loader = Loaders(data, plain_batches(args, model), accelerator).evaluation(data.val)
    found = {"split": data.val.name, **evaluate(accelerator.prepare(model), loader, accelerator).as_line()}
    skipped = count_skipped(accelerator, loader)
    found["images"] = None if data.val.size is None else len(data.val) - skipped
    holds = _report(args, found, training, accelerator)
    if not holds:
        sys.exit(1)


def _same_images(args: argparse.Namespace, found: dict, training: TrainingRecord) -> bool:
    """Tell whether the claim is of the images that were measured, as far as their names and number tell."""
    claim, data = training.results, training.data or DataRecord()
    if claim is None or not same_split(claim.split, found["split"]) or claim.images != found["images"]:
        return False
    if args.data_dir is not None:
        return Path(args.data_dir).resolve().name == training.dataset
    return without_prefix(args.dataset) in (data.name, data.hub_id)


def _report(args: argparse.Namespace, found: dict, training: TrainingRecord, accelerator: Accelerator) -> bool:
    """Print what was measured; whether the claim holds."""
    claim, comparable = training.results, _same_images(args, found, training)
    difference = found["top1"] - claim.top1 if claim is not None and comparable else None
    holds = difference is None or abs(difference) <= TOLERANCE
    if args.json:
        claimed = None if claim is None else claim.to_dict()
        accelerator.print(json.dumps({**found, "claimed": claimed, "holds": holds if comparable else None}))
        return holds
    accelerator.print(
        f"{args.checkpoint} on {found['split']}: top-1 {found['top1']:.2f} %, "
        f"top-5 {found['top5']:.2f} %, loss {found['eval_loss']:.4f}"
    )
    if claim is not None and comparable:
        accelerator.print(
            f"claimed: top-1 {claim.top1:.2f} %; {'it holds' if holds else 'it does NOT hold'} "
            f"(difference {difference:+.2f})"
        )
    else:
        other = "nothing" if claim is None else f"for other images: {claim.images} of split {claim.split!r}"
        accelerator.print(f"claimed: {other}")
    return holds


if __name__ == "__main__":
    main()
