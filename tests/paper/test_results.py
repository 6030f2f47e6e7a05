"""Results are paired by seed, kept, refused where they do not fit each other, and shown as tables."""

import json
import math
import re
import shutil
import statistics

import pytest

from apart_hf import ApartError
from apart_hf.cli.reproduce import main
from apart_hf.paper.jobs import check_together
from apart_hf.paper.results import Difference, Line, read_results, render
from apart_hf.paper.tables import TABLES
from tests.support.helpers import ROOT
from tests.support.jobs import run_of, runs_of_rows


def test_differences_are_paired_by_seed():
    baseline, values = {0: 70.0, 1: 71.0, 2: 69.5, 7: 10.0}, {0: 72.0, 1: 72.5, 2: 72.0, 4: 99.0}
    pairs = [2.0, 1.5, 2.5]
    found = Difference.of(values, baseline)
    assert found.mean == pytest.approx(2.0)
    assert found.half_width == pytest.approx(4.302653 * statistics.stdev(pairs) / math.sqrt(3), rel=1e-6)  # t, 2 d.o.f.
    assert Difference.of({0: 72.0}, baseline) == Difference(2.0, None)
    assert Difference.of({0: 71.0, 1: 72.0}, baseline) == Difference(1.0, 0.0)
    assert Difference.of({5: 1.0}, baseline) is None


def test_a_table_leaves_empty_what_was_not_run():
    text = render(
        [
            Line("standard", {0: 70.0, 1: 71.0}, 1.0, (76.1, 0.24)),
            Line("standard-2x", {}, 2.0, (76.73, None)),
            Line("apart", {1: 73.0}, 2.0, None),
        ],
        ("standard", "standard-2x"),
    )
    assert text.splitlines()[2:] == [
        "| standard | 1.00x | 2 | 70.50 ± 0.71 | 76.10 ± 0.24 |  |  |",
        "| standard-2x | 2.00x |  |  | 76.73 |  |  |",
        "| apart | 2.00x | 1 | 73.00 |  | +2.00 |  |",
    ]


@pytest.mark.parametrize("scale, seeds", [("small", 3), ("medium", 2)])
def test_the_results_kept_here_are_those_of_their_commands(scale, seeds, tmp_path, capsys):
    """Nothing is run again that is there, and the table is the one beside them."""
    kept = ROOT / "results"
    runs = runs_of_rows(kept / f"study-cifar100-wide_resnet16_2-{scale}.md")
    assert runs["apart"] == runs["standard"] == seeds and "random-bn-n1" in runs
    left = sum(max(seeds - runs[row], 0) for row in TABLES["study"].part(None, None)[1])
    for file in kept.glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    main(["study", "--scale", scale, "--seeds", str(seeds), "--results", str(tmp_path), "--dry-run"])
    assert capsys.readouterr().out.count("apart-hf train ") == left
    main(["study", "--scale", scale, "--results", str(tmp_path), "--render"])
    name = f"study-cifar100-wide_resnet16_2-{scale}.md"
    table = (tmp_path / name).read_text()
    assert table == (kept / name).read_text()
    shown = re.sub(r"^\| \S+ \| \S+ \|[ |]*\n", "", table, flags=re.M)  # the page leaves out what was not run
    assert len(shown.splitlines()) == 2 + sum(1 for of_row in runs.values() if of_row)
    assert shown in (ROOT / "docs/RESULTS.md").read_text()


def test_results_of_other_settings_share_no_table(tmp_path, capsys):
    def kept(row, *flags):
        made = run_of("table1", row, "--", *flags)
        return {
            "run": made.name,
            "row": row,
            "seed": 0,
            "cost": made.cost,
            "settings": made.settings,
            "data": "x",
            "amp_dtype": "float32",
            "processes": 1,
            "result": {"top1": 50.0},
            "whole": True,
            "images": 50_000,
        }

    def rendered(*results):
        (tmp_path / "all.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
        main(["table1", "--results", str(tmp_path), "--render"])
        return capsys.readouterr().out

    assert "| 50.00 | 76.10 ± 0.24 |" in rendered(kept("standard", "--channels-last"), kept("apart"))
    short = ("--epochs", "10", "--decay-milestones", "5")
    assert "| 50.00 |  |" in rendered(kept("standard", *short), kept("apart", *short))
    assert "no published value beside standard, apart: of other settings" in rendered(
        kept("standard", *short), kept("apart", *short)
    )
    assert "| 50.00 |  |" in rendered(kept("standard") | {"images": 500}, kept("apart"))  # of other data
    with pytest.raises(SystemExit):
        rendered(kept("standard", *short), kept("apart"))
    assert "cannot stand in one table: what they have beyond their rows is {'epochs': 10" in capsys.readouterr().err


def test_results_that_cannot_be_trusted(tmp_path):
    line = {
        "run": "a",
        "result": {"top1": 1.0},
        "row": "standard",
        "seed": 0,
        "settings": {},
        "data": "x",
        "amp_dtype": "float32",
        "processes": 1,
        "cost": 1.0,
    }
    (tmp_path / "one.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "two.jsonl").write_text(json.dumps(line) + "\n")  # merged by file, the same run twice
    assert list(read_results(tmp_path)) == ["a"]
    (tmp_path / "two.jsonl").write_text(json.dumps(line | {"result": {"top1": 2.0}}) + "\n")
    with pytest.raises(ApartError, match=r"line 1: another result of a has result top1 1.0 rather than top1 2.0"):
        read_results(tmp_path)
    (tmp_path / "two.jsonl").write_text(json.dumps(line) + '\n{"run"')
    with pytest.raises(ApartError, match=r"two.jsonl, line 2: no result \(Expecting"):
        read_results(tmp_path)
    for wrong, message in [
        ({"data": None}, "data missing"),
        ({"seed": "0"}, "seed missing or of another type"),
        ({"settings": None}, "settings"),
        ({"row": []}, "row"),
        ({"run": {}}, "run"),
        ({"result": {"top1": "30"}}, "top1 is '30', not in 0..100"),
        ({"result": {}}, "top1 is None"),
        ({"seed": -1}, "seed is -1"),
        ({"cost": None}, "cost"),
    ]:
        (tmp_path / "two.jsonl").write_text(json.dumps(line | wrong))
        with pytest.raises(ApartError, match=f"two.jsonl, line 1: no result: {message}"):
            read_results(tmp_path)
    (tmp_path / "two.jsonl").write_text("[1]")
    with pytest.raises(ApartError, match=r"line 1: no result: it is no table of keys"):
        read_results(tmp_path)
    (tmp_path / "two.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ApartError, match=r"two.jsonl: cannot be read"):
        read_results(tmp_path)
    check_together([line, line | {"run": "b"}])
    with pytest.raises(ApartError, match=r"a and b cannot stand in one table: data is x and y; keep such results"):
        check_together([line, line | {"run": "b", "data": "y"}])
