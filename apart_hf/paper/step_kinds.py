"""Where the time of a method's step goes that two plain steps would not take, by kind of operation."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from apart_hf.paper.step_costs import Contender

KINDS = {
    "convolution": ("convolution", "mkldnn", "cudnn"),
    "batch norm": ("batch_norm", "addcmul"),
    "activation": ("relu", "threshold", "silu", "gelu", "hardtanh"),
    "optimizer": ("_foreach", "SGD", "Optimizer"),
    "matrix product": ("addmm", "aten::mm", "bmm"),
}


def profile(contenders: Sequence[Contender], steps: int) -> str:
    """Render, as Markdown, the ms of each kind of operation in a step, and what is beyond twice the first's.

    Args:
        contenders: two of them.
        steps: of each, under torch's profiler.
    """
    first, second = (_time_by_kind(contender, steps) for contender in contenders)
    total = 2 * sum(first.values())
    lines = ["| kind | first, twice | second | beyond, ms | of two steps |", "|---|---|---|---|---|"]
    for kind in first:
        beyond = second[kind] - 2 * first[kind]
        lines.append(f"| {kind} | {2 * first[kind]:.0f} | {second[kind]:.0f} | {beyond:+.0f} | {beyond / total:+.1%} |")
    beyond = sum(second.values()) - total
    lines.append(f"| all | {total:.0f} | {sum(second.values()):.0f} | {beyond:+.0f} | {beyond / total:+.1%} |")
    return "\n".join(lines)


def _time_by_kind(contender: Contender, steps: int) -> dict[str, float]:
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
    return kinds
