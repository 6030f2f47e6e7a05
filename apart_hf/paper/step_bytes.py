"""What each operation of a step reads and writes, for two methods side by side: memory bounds most of them on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from apart_hf.paper.step_costs import Contender
from apart_hf.utils.environment import git_commit, versions
from apart_hf.utils.operation_counts import OperationCounts

SHARE = 0.01  # of the second method's bytes, below which operations are shown together
MIB = 2**20


def count_bytes(contenders: Sequence[Contender], steps: int | None = None) -> dict[str, Any]:
    """Count the operations of whole steps, and their bytes, with the optimizer's update.

    Args:
        contenders: two methods of one case.
        steps: of each, whose time is taken too, under torch's profiler: the device's own where there is one. None: no
            time is taken.

    Returns:
        The "case", "methods", "versions", "commit" and, by the name of each operation, for each method how often it is
        dispatched, the bytes that it reads and writes and, if taken, its "ms" in a step.
    """
    found = []
    for contender in contenders:
        contender.step()  # state of the optimizer is made once
        with OperationCounts(contender.model) as counts:
            contender.step()
        found.append(counts)
    names = dict.fromkeys(name for counts in found for name in counts.operations)
    ms = [] if steps is None else [_milliseconds(contender, steps) for contender in contenders]
    return {
        "case": dataclasses.asdict(contenders[0].case),
        "methods": [contender.method for contender in contenders],
        "versions": versions(),
        "commit": git_commit(),
        "operations": {name: [[c.operations[name], c.read[name], c.written[name]] for c in found] for name in names},
        "ms": {name: [of.get(name, 0.0) for of in ms] for name in names if ms},
    }


def _milliseconds(contender: Contender, steps: int) -> dict[str, float]:
    """Measure the time of each operation in a step, with that of the kernels that it is made of."""
    on_device = contender.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_device else []
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(steps):
            contender.step()
        contender.synchronise()
    found = {}
    for event in recorded.key_averages():
        microseconds = event.device_time_total if on_device else event.cpu_time_total
        found[event.key.removeprefix("aten::")] = microseconds / 1000 / steps
    return found


def table(counted: Mapping[str, Any]) -> str:
    """Render what `count_bytes` returned as a line on the steps and a Markdown table, with times if there are any."""
    case, methods, timed = counted["case"], counted["methods"], bool(counted.get("ms"))
    operations = {
        name: [[*of, ms] for of, ms in zip(each, counted["ms"][name] if timed else (0.0, 0.0))]
        for name, each in counted["operations"].items()
    }
    all_of_second = sum(_moved(each[1]) for each in operations.values())
    shown = {name: each for name, each in operations.items() if _moved(each[1]) >= SHARE * all_of_second}
    rows = dict(sorted(shown.items(), key=lambda row: -_moved(row[1][1])))
    rows["others"] = _sum(each for name, each in operations.items() if name not in shown)
    rows["all"] = _sum(operations.values())
    columns = ["times", "read, MiB", "written, MiB", *(["ms"] if timed else [])]
    header = ["operation", *(f"{m}: {what}" for m in methods for what in columns)]
    lines = [header, ["---"] * len(header)]
    for name, each in rows.items():
        lines.append([name])
        for times, read, written, ms in each:
            lines[-1] += [f"{times:,}", f"{read / MIB:,.1f}", f"{written / MIB:,.1f}"]
            lines[-1] += [f"{ms:.2f}"] if timed else []
    first, second = rows["all"]
    size = f"{case['img_size']}x{case['img_size']}" if case["img_size"] else "images of the model's size"
    how = [
        f"{case['model']}, batch {case['batch_size']}, {size}, {case['groups']} groups",
        case["amp_dtype"],
        "channels_last" if case["channels_last"] else "NCHW",
        f"kernels of {case['kernels']}",
        f"torch {counted['versions']['torch']}",
        f"{methods[1]} moves {_moved(second) / _moved(first):.2f} times the bytes of {methods[0]}",
    ]
    return ", ".join(how) + "\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _moved(of_method: Sequence[float]) -> float:
    _, read, written, _ = of_method
    return read + written


def _sum(rows: Iterable[list[list[float]]]) -> list[list[float]]:
    """Add up rows, for each method by itself."""
    total: list[list[float]] = [[0, 0, 0, 0.0], [0, 0, 0, 0.0]]
    for each in rows:
        total = [[a + b for a, b in zip(one, other)] for one, other in zip(total, each)]
    return total
