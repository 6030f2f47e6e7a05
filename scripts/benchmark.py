#!/usr/bin/env python
"""Time the training step of several methods side by side: interleaved repeats in one process, medians, ratios.

    python scripts/benchmark.py --model wide_resnet40_2 --batch-size 128 --methods standard,apart,sam,apart-sam
    python scripts/benchmark.py --model wide_resnet16_2,resnet18 --img-size 32,224 --batch-size 128,32 --groups 16,4
    python scripts/benchmark.py --render docs/COST.md

A step is accumulate_gradients, an SGD step and zero_grad on random images. Ratios are taken within each round, to the
first method named, so that a machine that slows down slows all of them; the spread is the interquartile range of a
step's time. --count adds the operations that one accumulate_gradients dispatches, views aside, and how many of them
copy activations. --profile adds where the time of the second method named goes that two steps of the first would not
take. --bytes counts, in the place of all that, what each operation of a step of two methods reads and writes, and with
--profile takes its time. --render writes anew the tables of a document that come from files of --json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch

from apart_hf.batchnorm.kernels import KernelSet
from apart_hf.errors import ApartError
from apart_hf.paper import cost_tables, step_bytes
from apart_hf.paper.step_costs import StepCase, make_contenders, measure
from apart_hf.paper.step_kinds import profile
from apart_hf.strategies.methods import list_strategies
from apart_hf.utils.allocator import keep_freed_memory
from apart_hf.utils.command_line import Parser, at_least, run_command
from apart_hf.utils.files import write_whole

ROOT = Path(__file__).parents[1]


def several(kind: Callable[[str], object]) -> Callable[[str], list]:
    """Make a type for argparse: values between commas."""
    return lambda text: [kind(part.strip()) for part in text.split(",")]


def parse(prog: str) -> argparse.Namespace:
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    of_each = "; one for all models, or one for each, between commas"
    parser.add_argument("--model", action="extend", type=several(str), metavar="NAME,...", help="[wide_resnet40_2]")
    parser.add_argument(
        "--batch-size", type=several(at_least(1)), default=[128], metavar="N,...", help=f"[128]{of_each}"
    )
    parser.add_argument(
        "--img-size", type=several(at_least(1)), default=[None], metavar="N,...", help=f"edge [the model's]{of_each}"
    )
    parser.add_argument("--groups", type=several(at_least(1)), default=[16], metavar="N,...", help=f"[16]{of_each}")
    parser.add_argument("--num-classes", type=at_least(1), default=100, metavar="N", help="[100]")
    parser.add_argument(
        "--methods",
        type=several(str),
        default=["standard", "apart"],
        metavar="NAME,...",
        help="the first is the measure [standard,apart]; NAME:KEY=VALUE sets a hyper-parameter, as in advprop:steps=1: "
        f"{', '.join(list_strategies())}",
    )
    parser.add_argument("--repeats", type=at_least(1), default=15, metavar="N", help="rounds, after two others [15]")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--amp-dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--torchcompile", action="store_true")
    parser.add_argument("--cuda-graph", action="store_true", help="record a step once, and replay it (GPUs)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--kernels", choices=get_args(KernelSet), default="auto", help="of batch norm; auto: those of the device"
    )
    parser.add_argument("--threads", type=at_least(1, 1024), metavar="N", help="CPU threads [torch's own choice]")
    parser.add_argument("--count", action="store_true", help="count operations and copies of activations")
    parser.add_argument("--bytes", action="store_true", help="only count what operations read and write in a step")
    parser.add_argument("--profile", type=at_least(1), metavar="STEPS", help="steps of each under torch.profiler")
    parser.add_argument("--no-mallopt", action="store_true", help="leave the thresholds of glibc's allocator")
    parser.add_argument(
        "--json", nargs="?", type=Path, const=Path(), metavar="FILE", help="write the figures [results/cost-....json]"
    )
    parser.add_argument("--render", type=Path, metavar="FILE", help="only write the tables of this document anew")
    return parser.parse_args()


def cases(args: argparse.Namespace) -> list[StepCase]:
    """Join the models with what is given for each of them."""
    models, columns = args.model or ["wide_resnet40_2"], []
    for flag, values in (("batch-size", args.batch_size), ("img-size", args.img_size), ("groups", args.groups)):
        if len(values) not in (1, len(models)):
            raise ApartError(
                f"--{flag} has {len(values)} values for {len(models)} models; give one, or one for each model."
            )
        columns.append(values * len(models) if len(values) == 1 else values)
    names = ("num_classes", "channels_last", "amp_dtype", "torchcompile", "cuda_graph", "device", "kernels")
    return [StepCase(*values, **{name: getattr(args, name) for name in names}) for values in zip(models, *columns)]


def main(prog: str) -> None:
    args = parse(prog)
    if args.render:
        try:
            write_whole(args.render, cost_tables.with_tables(args.render.read_text(), ROOT))
        except (OSError, UnicodeDecodeError) as error:
            raise ApartError(f"--render {args.render}: {error}; name a document that can be written.") from error
        return
    if args.profile and len(args.methods) < 2:
        raise ApartError("--profile compares two methods; name two with --methods.")
    wanted = cases(args)
    if args.bytes and (len(args.methods) != 2 or len(wanted) != 1):
        raise ApartError("--bytes compares two methods on one model; name two with --methods, and one with --model.")
    kind = "bytes" if args.bytes else "cost"
    file = cost_tables.default_file(wanted, ROOT / "results", kind) if args.json == Path() else args.json
    if file is not None:
        cost_tables.check_file(file)
    keeps_memory = not args.no_mallopt and keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.bytes:
        counted = step_bytes.count_bytes(make_contenders(wanted[0], args.methods), args.profile)
        print(step_bytes.table(counted))
        if file is not None:
            cost_tables.write(file, counted)
        return
    rows, profiles = [], []
    for case in wanted:
        contenders = make_contenders(case, args.methods)
        rows.append(measure(contenders, args.repeats, count=args.count))
        if args.profile:
            profiles.append(f"{case.model}\n\n{profile(contenders[:2], args.profile)}")
    threads = torch.get_num_threads()
    costs = cost_tables.record(wanted, rows, repeats=args.repeats, threads=threads, keeps_memory=keeps_memory)
    print(cost_tables.table(costs), *profiles, sep="\n")
    if file is not None:
        cost_tables.write(file, costs)


if __name__ == "__main__":
    run_command(main)
