#!/usr/bin/env python
"""Time the training step of several methods side by side: interleaved repeats in one process, medians, ratios.

    python scripts/benchmark.py --model wide_resnet40_2 --batch-size 128 --methods standard,apart,sam,apart-sam

A step is accumulate_gradients, an SGD step and zero_grad on random images. Ratios are taken within each round, to the
first method named, so that a machine that slows down slows all of them. --profile adds where the time of the second
method named goes that two steps of the first would not take.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import timm
import torch
from torch import nn

from apart_hf import create_strategy
from apart_hf.strategies.methods import METHODS
from apart_hf.utils.environment import versions

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wide_resnet40_2")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--img-size", type=int, help="edge in pixels [the model's]")
    parser.add_argument("--num-classes", type=int, default=100)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--methods", default="standard,apart", help="separated by commas; the first is the measure")
    parser.add_argument("--repeats", type=int, default=15, help="rounds, after two that do not count")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--amp-dtype", choices=DTYPES, default="float32")
    parser.add_argument("--torchcompile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads [torch's own choice]")
    parser.add_argument("--profile", type=int, metavar="STEPS", help="steps of each under torch.profiler, interleaved")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    return parser.parse_args()


class Contender:
    """One method on a model of its own."""

    def __init__(self, method: str, args: argparse.Namespace):
        torch.manual_seed(0)
        device, dtype = torch.device(args.device), DTYPES[args.amp_dtype]
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = timm.create_model(args.model, num_classes=args.num_classes).to(device, memory_format=layout)
        size = args.img_size or self.model.pretrained_cfg["input_size"][-1]
        self.images = torch.randn(args.batch_size, 3, size, size, device=device).contiguous(memory_format=layout)
        self.targets = torch.randint(args.num_classes, (args.batch_size,), device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.device, self.criterion = device, nn.CrossEntropyLoss()
        run = torch.compile(self.model) if args.torchcompile else self.model
        self.strategy = create_strategy(
            method,
            run,
            autocast=dtype and (lambda: torch.autocast(device.type, dtype)),
            **({"groups": args.groups} if "groups" in METHODS[method].hyper_parameters() else {}),
        )
        self.seconds: list[float] = []

    def step(self) -> None:
        self.strategy.accumulate_gradients(self.images, self.targets, self.criterion)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed_step(self) -> None:
        self._synchronise()
        start = time.perf_counter()
        self.step()
        self._synchronise()
        self.seconds.append(time.perf_counter() - start)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory(self) -> float | None:
        """MiB allocated at the peak of one step; on the CPU by the profiler's record of allocations."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step()
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.step()
        held = peak = 0
        for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak / 2**20


KINDS = {
    "convolution": ("convolution", "mkldnn", "cudnn"),
    "batch norm": ("batch_norm", "addcmul"),
    "activation": ("relu", "threshold", "silu", "gelu", "hardtanh"),
    "optimizer": ("_foreach", "SGD", "Optimizer"),
    "matrix product": ("addmm", "aten::mm", "bmm"),
}


def profile(contenders: list[Contender], steps: int) -> str:
    """Time of each kind of operation in a step of both, and what the second's has beyond twice the first's, in ms."""
    spent = []
    for contender in contenders:
        kinds = dict.fromkeys([*KINDS, "other operations", "outside of operations"], 0.0)
        wall = 0.0
        for _ in range(steps):
            with torch.profiler.profile() as recorded:
                start = time.perf_counter()
                contender.step()
                wall += time.perf_counter() - start
            for event in recorded.key_averages():
                kind = next((k for k, parts in KINDS.items() if any(p in event.key for p in parts)), "other operations")
                kinds[kind] += event.self_cpu_time_total / 1000 / steps
        kinds["outside of operations"] = 1000 * wall / steps - sum(kinds.values())
        spent.append(kinds)
    first, second = spent
    total = 2 * sum(first.values())
    lines = ["| kind | first, twice | second | beyond, ms | of two steps |", "|---|---|---|---|---|"]
    for kind in first:
        beyond = second[kind] - 2 * first[kind]
        lines.append(f"| {kind} | {2 * first[kind]:.0f} | {second[kind]:.0f} | {beyond:+.0f} | {beyond / total:+.1%} |")
    beyond = sum(second.values()) - total
    lines.append(f"| all | {total:.0f} | {sum(second.values()):.0f} | {beyond:+.0f} | {beyond / total:+.1%} |")
    return "\n".join(lines)


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.profile and "," not in args.methods:
        raise SystemExit("--profile compares two methods; name two with --methods.")
    contenders = {method: Contender(method, args) for method in args.methods.split(",")}
    for repeat in range(args.repeats + 2):
        for contender in contenders.values():
            contender.timed_step()
            if repeat < 2:
                contender.seconds.clear()
    baseline = next(iter(contenders.values()))
    rows = []
    for method, contender in contenders.items():
        ratios = sorted(a / b for a, b in zip(contender.seconds, baseline.seconds))
        rows.append(
            {
                "method": method,
                "ms_per_step": 1000 * statistics.median(contender.seconds),
                "images_per_second": args.batch_size / statistics.median(contender.seconds),
                "ratio_min": ratios[0],
                "ratio_median": statistics.median(ratios),
                "ratio_max": ratios[-1],
                "peak_memory_mib": contender.peak_memory(),
            }
        )
    name = torch.cuda.get_device_name(args.device) if baseline.device.type == "cuda" else platform.machine()
    layout, mode = "channels_last" if args.channels_last else "NCHW", "compiled" if args.torchcompile else "eager"
    print(
        f"{args.model}, batch {args.batch_size}, {args.amp_dtype}, {layout}, {mode}, {args.device} ({name}), "
        f"{torch.get_num_threads()} threads"
    )
    print("| method | ms/step | images/s | ratio: min - median - max | peak memory (MiB) |\n|---|---|---|---|---|")
    for row in rows:
        ratio = " - ".join(f"{row[f'ratio_{key}']:.2f}" for key in ("min", "median", "max"))
        print(
            f"| {row['method']} | {row['ms_per_step']:.0f} | {row['images_per_second']:.0f} | {ratio} | "
            f"{row['peak_memory_mib']:.0f} |"
        )
    if args.profile:
        print(profile(list(contenders.values())[:2], args.profile))
    if args.json:
        figures = {"arguments": vars(args), "device_name": name, "versions": versions(), "rows": rows}
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
