"""What each operation of a step reads and writes, for two methods side by side: memory bounds most of them on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from apart_hf.paper.step_costs import Contender
from apart_hf.utils.environment import git_commit, versions
from apart_hf.utils.operation_counts import OperationCounts

SHARE = 0.01  # of the second method's bytes, below which operations are shown together
MIB = 2**20


def count_bytes(contenders: Sequence[Contender]) -> dict[str, Any]:
    """Count the operations of whole steps, and their bytes, with the optimizer's update.

    Args:
        contenders: two methods of one case.

    Returns:
        The "case", "methods", "versions", "commit" and, by the name of each operation, for each method how often it is
        dispatched, and the bytes that it reads and writes.
    """
    found = []
    for contender in contenders:
        contender.step()  # state of the optimizer is made once
        with OperationCounts(contender.model) as counts:
            contender.step()
        found.append(counts)
    names = dict.fromkeys(name for counts in found for name in counts.operations)
    return {
        "case": dataclasses.asdict(contenders[0].case),
        "methods": [contender.method for contender in contenders],
        "versions": versions(),
        "commit": git_commit(),
        "operations": {name: [[c.operations[name], c.read[name], c.written[name]] for c in found] for name in names},
    }


def table(counted: Mapping[str, Any]) -> str:
    """Render what `count_bytes` returned as a line on the steps and a Markdown table, with empty places for times."""
    case, methods, operations = counted["case"], counted["methods"], counted["operations"]
    all_of_second = sum(_moved(each[1]) for each in operations.values())
    shown = {name: each for name, each in operations.items() if _moved(each[1]) >= SHARE * all_of_second}
    rows = dict(sorted(shown.items(), key=lambda row: -_moved(row[1][1])))
    rows["others"] = _sum(each for name, each in operations.items() if name not in shown)
    rows["all"] = _sum(operations.values())
    header = ["operation", *(f"{m}: {what}" for m in methods for what in ("times", "read, MiB", "written, MiB", "ms"))]
    lines = [header, ["---"] * len(header)]
    for name, each in rows.items():
        cells = [f"{n:,} | {read / MIB:,.1f} | {written / MIB:,.1f} | " for n, read, written in each]
        lines.append([name, *cells])
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


def _moved(of_method: Sequence[int]) -> int:
    _, read, written = of_method
    return read + written


def _sum(rows: Any) -> list[list[int]]:
    """Add up rows, for each method by itself."""
    total = [[0, 0, 0], [0, 0, 0]]
    for each in rows:
        total = [[a + b for a, b in zip(one, other)] for one, other in zip(total, each)]
    return total
