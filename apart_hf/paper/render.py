"""A table of the results that are there, as Markdown beside them, with a plot of gain over cost."""

from __future__ import annotations

import logging
from typing import Any

from apart_hf.errors import ApartError
from apart_hf.paper.comparisons import compare, render_comparisons
from apart_hf.paper.figures import plot_gains
from apart_hf.paper.jobs import Job, check_together, extra, is_published, make_job, setting, unknown_rows
from apart_hf.paper.request import TableRequest
from apart_hf.paper.results import Difference, Line, read_results, render
from apart_hf.paper.scales import SCALES
from apart_hf.paper.tables import TABLES

_log = logging.getLogger(__name__)


def table_name(request: TableRequest) -> str:
    """Name the table's files: TABLE-DATASET-MODEL-SCALE."""
    (dataset, model), _ = TABLES[request.table].part(request.dataset, request.model)
    return f"{request.table}-{setting(request, dataset, model)}-{request.scale}"


def results_shown(request: TableRequest) -> list[dict[str, Any]]:
    """List the results that are in the table, whichever rows and seeds are asked for."""
    results = read_results(request.results)
    return [_seen(job, results[job.name]) for job in _jobs(request, results) if job.name in results]


def render_table(request: TableRequest) -> str:
    """Write the table of all results that are there beside them, with a plot of gains over costs.

    Args:
        request: its rows and seeds are not asked for.

    Returns:
        The table in Markdown, under a title; what was not run is empty.

    Raises:
        ApartError: where results cannot stand in one table, or it cannot be written.
    """
    (dataset, model), published = TABLES[request.table].part(request.dataset, request.model)
    results = read_results(request.results)
    jobs = _jobs(request, results)
    tried = unknown_rows(results.values(), setting(request, dataset, model), request.scale)
    there = [job for job in jobs if job.name in results]
    check_together([*(_seen(job, results[job.name]) for job in there), *tried])
    title = f"{TABLES[request.table].title}, scale {request.scale}"
    strange = [job.row for job in there if not is_published(job, results[job.name])]
    if request.scale != "full":
        published = dict.fromkeys(published)  # they are of other settings
    elif strange:
        published = published | dict.fromkeys(strange)
        _log.info(
            f"no published value beside {', '.join(dict.fromkeys(strange))}: of other settings, images or numbers of "
            "processes than the paper's"
        )
    lines = [
        Line(
            row,
            {job.seed: results[job.name]["result"]["top1"] for job in there if job.row == row},
            next(job.cost for job in jobs if job.row == row),
            published[row],
        )
        for row in published
    ]
    more = [
        Line(row, {result["seed"]: result["result"]["top1"] for result in tried if result["row"] == row}, cost, None)
        for row, cost in {result["row"]: result["cost"] for result in tried}.items()
    ]
    table = render([*lines, *more], TABLES[request.table].against)
    text = (
        f"{title}: top-1 accuracy, mean ± standard deviation over seeds; differences are paired by seed, ± 95 % "
        f"confidence\n\n{table}"
    )
    if not there:
        return text
    tested = SCALES[request.scale].tested
    compared = render_comparisons(compare({line.name: line.accuracies for line in lines}, tested), len(tested))
    if compared:
        text, table = f"{text}\n{compared}", f"{table}\n{compared}"
    file = request.results / f"{table_name(request)}.md"
    standard = next((line.accuracies for line in lines if line.name == "standard"), {})
    gains = [
        (line.name, line.cost, gain)
        for line in lines
        if line.name != "standard" and (gain := Difference.of(line.accuracies, standard)) is not None
    ]
    try:
        file.write_text(table)
        if gains:
            plot_gains(gains, file.with_suffix(".png"), title)
    except OSError as error:
        raise ApartError(f"cannot write {file} and its plot: {error.strerror}; make room, or move it away.") from error
    return text


def _jobs(request: TableRequest, results: dict[str, dict[str, Any]]) -> list[Job]:
    """List every row of the table, in the seeds of any result; at least one."""
    (dataset, model), published = TABLES[request.table].part(request.dataset, request.model)
    seeds = sorted({result["seed"] for result in results.values()}) or [0]
    return [make_job(request, dataset, model, row, seed) for row in published for seed in seeds]


def _seen(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """Add to a result what it was computed with beyond its row."""
    return result | {"extra": extra(job, result)}
