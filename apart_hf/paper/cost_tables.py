"""Costs of steps as a file and as a table, and documents whose tables come from such files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apart_hf.errors import ApartError
from apart_hf.paper import step_bytes
from apart_hf.paper.step_costs import StepCase
from apart_hf.utils.environment import device_name, git_commit, versions
from apart_hf.utils.files import write_whole

_MARKED = re.compile(r"(<!-- (costs|bytes): (\S+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def record(cases: Sequence[StepCase], rows: Sequence[Sequence[Mapping[str, Any]]], **more: Any) -> dict[str, Any]:
    """Join what was measured with the machine and the versions that it was measured with.

    Args:
        cases: of the steps, with `rows` of each.
        rows: as `measure` returns them.
        **more: how it was measured, such as repeats and threads.
    """
    tables = [{"case": dataclasses.asdict(case), "rows": list(part)} for case, part in zip(cases, rows, strict=True)]
    return {"machine": device_name(), "versions": versions(), "commit": git_commit(), **more, "tables": tables}


def default_file(cases: Sequence[StepCase], folder: Path = Path("results"), kind: str = "cost") -> Path:
    """Name the file of costs, or of another `kind`, by what they are of: cost-MODEL-...-LAYOUT-DTYPE-DEVICE.json."""
    first = cases[0]
    parts = [*dict.fromkeys(case.model for case in cases), "channels_last" if first.channels_last else "nchw"]
    parts += [first.amp_dtype, *(["compiled"] if first.torchcompile else [])]
    parts += [*(["graph"] if first.cuda_graph else []), first.device]
    parts += [] if first.kernels == "auto" else [f"kernels_of_{first.kernels}"]
    return folder / f"{kind}-{re.sub(r'[^A-Za-z0-9._-]+', '_', '-'.join(parts))}.json"


def check_file(file: Path) -> None:
    """Make the folder of a file that will be written.

    Raises:
        ApartError: where it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a"):
            pass
        if not file.stat().st_size:
            file.unlink()
    except OSError as error:
        raise ApartError(f"--json {file}: cannot be written ({error.strerror}); choose another file.") from error


def write(file: Path, costs: Mapping[str, Any]) -> None:
    """Write what `record` returned."""
    try:
        write_whole(file, json.dumps(costs, indent=1) + "\n")
    except OSError as error:
        raise ApartError(f"--json {file}: cannot be written ({error.strerror}); choose another file.") from error


def table(costs: Mapping[str, Any]) -> str:
    """Render costs as a line on how they were measured, and a Markdown table."""
    tables = costs["tables"]
    first = tables[0]["case"]
    how = [
        first["amp_dtype"],
        "channels_last" if first["channels_last"] else "NCHW",
        "compiled" if first["torchcompile"] else "one graph a step" if first.get("cuda_graph") else "eager",
        f"{first['device']} ({costs['machine']})",
        *([] if first.get("kernels", "auto") == "auto" else [f"kernels of {first['kernels']}"]),
        f"{costs['threads']} thread{'s' if costs['threads'] > 1 else ''}",
        "freed memory kept" if costs["keeps_memory"] else "allocator as it is",
        f"torch {costs['versions']['torch']}",
        f"{costs['repeats']} rounds",
    ]
    counted = "operations" in tables[0]["rows"][0]
    header = ["model", "method", "ms/step", "spread", "images/s", "ratio: min - median - max"]
    header += ["page faults", "peak memory (MiB)", *(["operations", "copies"] if counted else [])]
    lines = [header, ["---"] * len(header)]
    for part in tables:
        lines += [_cells(part["case"], row, part["rows"][0]) for row in part["rows"]]
    return ", ".join(how) + "\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _cells(case: Mapping[str, Any], row: Mapping[str, Any], first: Mapping[str, Any]) -> list[str]:
    size = "" if case["img_size"] is None else f", {case['img_size']}x{case['img_size']}"
    is_first = row is first
    cells = [
        f"{case['model']}, batch {case['batch_size']}{size}, {case['groups']} groups" if is_first else "",
        row["method"],
        f"{row['ms_per_step']:.0f}",
        f"{row['spread']:.1f} %",
        f"{row['images_per_second']:.0f}",
        "1" if is_first else " - ".join(f"{row[f'ratio_{key}']:.2f}" for key in ("min", "median", "max")),
        f"{row['faults']:,.0f}",
        f"{row['peak_memory_mib']:.0f}",
    ]
    if "operations" in row:
        times = "" if is_first else f" ({row['operations'] / first['operations']:.2f}x)"
        cells += [f"{row['operations']:,}{times}", f"{row['copies']:,}"]
    return cells


def with_tables(document: str, root: Path) -> str:
    """Return a document with the tables of the files that it names.

    Args:
        document: Markdown with parts between `<!-- costs: FILE -->` and `<!-- end of costs -->`, or `bytes` in their
            places.
        root: folder that files are named from.

    Raises:
        ApartError: where it names none, or one that cannot be read.
    """

    def rendered(part: re.Match[str]) -> str:
        file, render = root / part[3], table if part[2] == "costs" else step_bytes.table
        try:
            costs = json.loads(file.read_text())
            return f"{part[1]}{render(costs)}{part[4]}"
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ApartError(f"{file}: cannot be read as costs ({reason}); measure it again, by --json.") from error

    found, count = _MARKED.subn(rendered, document)
    if not count:
        raise ApartError("the document has no part between <!-- costs: FILE --> and <!-- end of costs -->; add one.")
    return found
