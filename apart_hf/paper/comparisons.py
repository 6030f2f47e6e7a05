"""Differences that are tested together: paired by seed, with intervals, p-values corrected for their number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from scipy.stats import ttest_rel

LEVEL = 0.95  # of one interval; all together hold at it by Bonferroni's, of 1 - (1 - LEVEL) / tests


@dataclass(frozen=True)
class Comparison:
    """Holds the difference of two rows.

    Args:
        name: "ROW - ROW".
        seeds: pairs.
        mean: difference in per cent.
        interval: its confidence interval at 95 % (Student's t); None: fewer than two pairs, or equal differences.
        wide: the same at the level at which all intervals hold together (Bonferroni).
        p: of the two-sided paired t-test; None as `interval`.
        holm: p corrected for the number of tests (Holm, 1979).
    """

    name: str
    seeds: int
    mean: float
    interval: tuple[float, float] | None
    wide: tuple[float, float] | None
    p: float | None
    holm: float | None


def compare(accuracies: Mapping[str, Mapping[int, float]], pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
    """Compare pairs of rows over the seeds that both have; a pair without any is left out, but still counted.

    Args:
        accuracies: in per cent, by row and seed.
        pairs: (row, baseline); their number is that of the tests, whatever is there.
    """
    tests, found = len(pairs), []
    for row, baseline in pairs:
        differences, test = paired(accuracies.get(row, {}), accuracies.get(baseline, {}))
        if not differences:
            continue
        p = interval = wide = None
        if test is not None:
            p, interval, wide = float(test.pvalue), bounds(test, LEVEL), bounds(test, 1 - (1 - LEVEL) / tests)
        found.append(Comparison(f"{row} - {baseline}", len(differences), fmean(differences), interval, wide, p, None))
    corrected = iter(holm([one.p for one in found if one.p is not None], tests))
    return [one if one.p is None else replace(one, holm=next(corrected)) for one in found]


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> tuple[list[float], Any | None]:
    """Pair two rows by seed.

    Returns:
        The differences over the seeds that both have, in order, and scipy's result of their t-test; None where there
        are fewer than two, or all are equal.
    """
    seeds = sorted(values.keys() & baseline.keys())
    differences = [values[seed] - baseline[seed] for seed in seeds]
    if len({round(difference, 9) for difference in differences}) < 2:
        return differences, None
    return differences, ttest_rel([values[seed] for seed in seeds], [baseline[seed] for seed in seeds])


def bounds(test: Any, level: float) -> tuple[float, float]:
    """Return the confidence interval at `level` of scipy's result of a test."""
    low, high = test.confidence_interval(level)
    return float(low), float(high)


def holm(values: Sequence[float], tests: int) -> list[float]:
    """Correct p-values by Holm's step-down procedure for `tests` tests, of which some may lack a value."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, least = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (tests - rank) * values[index]))
        corrected[index] = least
    return corrected


def render_comparisons(comparisons: Iterable[Comparison], tests: int) -> str:
    """Render a Markdown table; it is empty where there is nothing to compare."""
    lines = [
        f"| {one.name} | {one.seeds} | {one.mean:+.2f} | {_interval(one.interval)} | {_interval(one.wide)} | "
        f"{_p(one.p)} | {_p(one.holm)} |\n"
        for one in comparisons
    ]
    level = 100 * (1 - (1 - LEVEL) / tests) if tests else 0
    header = [
        "difference",
        "seeds",
        "mean",
        f"{100 * LEVEL:g} % interval",
        f"{level:g} % interval",
        "p",
        f"p (Holm, {tests} tests)",
    ]
    return "".join([f"| {' | '.join(header)} |\n", f"|{' --- |' * len(header)}\n", *lines]) if lines else ""


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:+.2f} to {bounds[1]:+.2f}"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
