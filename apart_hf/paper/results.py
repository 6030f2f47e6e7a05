"""Results of runs as JSON lines, and tables of them: mean over seeds, beside what was published."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from apart_hf.errors import ApartError
from apart_hf.paper.comparisons import LEVEL, bounds, paired
from apart_hf.paper.tables import Published

_KINDS: dict[str, type | tuple[type, ...]] = {
    "run": str,
    "row": str,
    "seed": int,
    "cost": (int, float),
    "settings": dict,
    "data": str,
    "amp_dtype": str,
    "processes": int,
    "result": dict,
}


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the results of all files in a folder, by their run's name; the same run may stand in several files.

    Raises:
        ApartError: where a line cannot be read, or two results of one run differ.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ApartError(f"{path}: cannot be read ({error}); remove it.") from error
        for number, line in enumerate(lines, start=1):
            try:
                result = json.loads(line)
            except ValueError as error:
                raise ApartError(f"{path}, line {number}: no result ({error}); remove the line.") from error
            if wrong := _wrong(result):
                raise ApartError(f"{path}, line {number}: no result: {wrong}; remove the line.")
            other = found.setdefault(result["run"], result)
            for key in ("result", "settings", "data"):
                if _said(other, key) != _said(result, key):
                    raise ApartError(
                        f"{path}, line {number}: another result of {result['run']} has {key} "
                        f"{_said(other, key)} rather than {_said(result, key)}; remove one of them."
                    )
    return found


def _wrong(result: Any) -> str:
    """Say what keeps a line's value from being a result; empty: nothing."""
    if not isinstance(result, dict):
        return "it is no table of keys"
    wrong = [key for key, kind in _KINDS.items() if not isinstance(result.get(key), kind)]
    if wrong:
        return f"{', '.join(wrong)} missing or of another type"
    accuracy, seed = result["result"].get("top1"), result["seed"]
    if not isinstance(accuracy, (int, float)) or not 0 <= accuracy <= 100:
        return f"top1 is {accuracy!r}, not in 0..100"
    return "" if 0 <= seed < 2**32 else f"seed is {seed}"


def _said(result: dict[str, Any], key: str) -> Any:
    return f"top1 {result['result']['top1']}" if key == "result" else result[key]


def add_result(path: Path, result: dict[str, Any]) -> None:
    """Append one line to a file, which is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(result) + "\n")


@dataclass(frozen=True)
class Difference:
    """Holds the mean of paired differences in per cent, with half of its 95 % confidence interval (Student's t)."""

    mean: float
    half_width: float | None

    @classmethod
    def of(cls, values: dict[int, float], baseline: dict[int, float]) -> Difference | None:
        """Compare over the seeds that both have; None: there is none. One pair has no interval."""
        differences, test = paired(values, baseline)
        if not differences:
            return None
        if test is None:
            return cls(fmean(differences), None if len(differences) == 1 else 0.0)
        low, high = bounds(test, LEVEL)
        return cls(fmean(differences), (high - low) / 2)

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + ("" if self.half_width is None else f" ± {self.half_width:.2f}")


@dataclass(frozen=True)
class Line:
    """Holds a row of a table: accuracies in per cent by seed, cost in units of plain training, what was published."""

    name: str
    accuracies: dict[int, float]
    cost: float
    published: Published | None


def render(lines: Iterable[Line], against: Iterable[str]) -> str:
    """Render a Markdown table; what was not run is empty.

    Args:
        lines: the rows.
        against: names of rows that all are compared with: differences paired by seed, with a 95 % confidence interval
            of their mean.
    """
    lines = list(lines)
    of = {line.name: line.accuracies for line in lines}
    shows_published = any(line.published for line in lines)
    header = [
        "row",
        "budget",
        "runs",
        "top-1 (%)",
        *(["published (%)"] if shows_published else []),
        *(f"against {name}" for name in against),
    ]
    rows = [header, ["---"] * len(header)]
    for line in lines:
        cells = [
            line.name,
            f"{line.cost:.2f}x",
            str(len(line.accuracies) or ""),
            mean_and_deviation(list(line.accuracies.values())),
        ]
        if shows_published:
            cells.append("" if line.published is None else _with_deviation(*line.published))
        for baseline in against:
            difference = None if baseline == line.name else Difference.of(line.accuracies, of.get(baseline, {}))
            cells.append("" if difference is None else str(difference))
        rows.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def mean_and_deviation(values: list[float]) -> str:
    """Write the mean, with the standard deviation over runs where there are two or more."""
    return _with_deviation(fmean(values), stdev(values) if len(values) > 1 else None) if values else ""


def _with_deviation(mean: float, deviation: float | None) -> str:
    return f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
