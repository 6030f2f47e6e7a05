"""Tables asked for by a call, as in a notebook."""

import shutil
from pathlib import Path

import pytest

from apart_hf import ApartError
from apart_hf.paper.render import render_table, table_name
from apart_hf.paper.reproduce import jobs_left
from apart_hf.paper.request import TableRequest
from tests.support.helpers import ROOT
from tests.support.jobs import runs_of_rows


def test_a_table_by_a_call(tmp_path):
    kept = ROOT / "results"
    for file in kept.glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    request = TableRequest("study", scale="small", seeds=3, results=tmp_path)
    assert table_name(request) == "study-cifar100-wide_resnet16_2-small"
    text = render_table(request)
    assert text.startswith("Study, scale small: top-1 accuracy") and text.endswith(
        (kept / f"{table_name(request)}.md").read_text()
    )
    runs = runs_of_rows(kept / f"{table_name(request)}.md")
    assert runs["apart"] == 3 and {job.row for job in jobs_left(request)} == {row for row in runs if runs[row] < 3}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"table": "table4"}, "unknown table 'table4': did you mean"),
        ({"scale": "smal"}, "unknown scale 'smal'"),
        ({"seeds": 0}, "--seeds 0: at least 1"),
        ({"part": 2, "parts": 2}, "--shard '3/2': I/K with 1 <= I <= K"),
        ({"part": -1}, "--shard '0/1'"),
    ],
)
def test_a_request_that_cannot_be(values, message):
    with pytest.raises(ApartError, match=message):
        TableRequest(**{"table": "study", "results": Path("nowhere")} | values)
