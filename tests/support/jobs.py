"""Jobs of tables, by their command line."""

from __future__ import annotations

from apart_hf.cli.reproduce import _arguments, request_of
from apart_hf.paper.jobs import make_job
from apart_hf.paper.tables import TABLES


def run_of(table, row, *flags, seed=0):
    request = request_of(_arguments([table, *flags], "reproduce.py"))
    (dataset, model), _ = TABLES[table].part(request.dataset, request.model)
    return make_job(request, dataset, model, row, seed)


def runs_of_rows(table):
    """How many runs a table that was written down has of each row."""
    cells = [line.split("|")[1:4] for line in table.read_text().split("\n\n")[0].splitlines()[2:]]
    return {row.strip(): int(runs.strip() or 0) for row, _, runs in cells}
