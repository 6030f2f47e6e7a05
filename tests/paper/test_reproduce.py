"""Tables by command: rows become the right runs, results are kept, merged and compared by seed."""

import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from apart_hf import ApartError
from apart_hf.cli.reproduce import _arguments, main, request_of
from apart_hf.config.arguments import parse_arguments
from apart_hf.data import DataSettings
from apart_hf.data.decoding import rgb
from apart_hf.data.fingerprint import fingerprint
from apart_hf.paper.jobs import check_together, is_published, make_job
from apart_hf.paper.results import Difference, Line, read_results, render
from apart_hf.paper.subset import reduce_data
from apart_hf.paper.tables import ROWS, TABLES
from tests.support.helpers import ROOT, load, run


def run_of(table, row, *flags, seed=0):
    request = request_of(_arguments([table, *flags], "reproduce.py"))
    (dataset, model), _ = TABLES[table].part(request.dataset, request.model)
    return make_job(request, dataset, model, row, seed)


@pytest.mark.parametrize(
    "table, flags, row, cost, want",
    [
        ("table1", (), "standard", 1, {"epochs": 200, "decay_milestones": [100, 150], "mixup": 0}),
        ("table1", (), "standard-2x", 2, {"epochs": 400, "decay_milestones": [200, 300]}),
        ("table1", (), "apart", 2, {"epochs": 200, "epsilon": 0.1, "groups": 16, "ratio": 1.0, "batch_size": 128}),
        ("table1", ("--dataset", "cifar10"), "sam", 2, {"epochs": 200, "rho": 0.05, "dataset": "cifar10"}),
        ("table1", ("--model", "preact_resnet18"), "apart-sam-mixup", 2, {"rho": 0.2, "model": "preact_resnet18"}),
        ("table1", (), "standard-mixup-2x", 2, {"mixup": 1.0, "epochs": 400}),
        ("table2", (), "apart", 2, {"groups": 8, "batch_size": 256, "dataset": "tiny-imagenet"}),
        ("table2", ("--dataset", "imagenet"), "apart-4x", 4, {"epochs": 210, "decay_milestones": [60, 120, 180, 200]}),
        ("table2", ("--dataset", "imagenet"), "standard-4x", 4, {"epochs": 420, "model": "resnet18"}),
        ("table3", (), "standard-1.2x", 1.2, {"epochs": 240, "decay_milestones": [120, 180]}),
        ("table3", (), "apart-N24-n2", 1.1875, {"epochs": 200, "ratio": 24 / 128, "groups": 2}),
        ("table3", (), "apart-eps0.4-n8", 2, {"epsilon": 0.4, "groups": 8}),
        ("study", (), "apart-every2", 1.5, {"every": 2, "groups": 16, "epochs": 200}),
        ("study", (), "apart-ratio0.25", 1.25, {"ratio": 0.25}),
        ("study", (), "ghost-bn", 2, {"method": "ghost-bn", "epochs": 200, "weight_decay": 5e-4}),
        (
            "study",
            ("--scale", "medium"),
            "standard-2x",
            2,
            {"epochs": 120, "decay_milestones": [60, 90], "model": "wide_resnet16_2", "padding": 2, "lr": 0.1},
        ),
        ("study", ("--scale", "medium"), "ghost-bn", 2, {"groups": 16, "batch_size": 128, "amp_dtype": "bfloat16"}),
        ("study", ("--scale", "small"), "sam", 2, {"groups": None, "rho": 0.1, "batch_size": 64, "epochs": 48}),
        ("study", ("--scale", "small"), "ghost-bn", 2, {"groups": 8, "amp_dtype": "float32"}),
        (
            "study",
            ("--scale", "long"),
            "standard",
            1,
            {
                "epochs": 100,
                "decay_milestones": [50, 75],
                "batch_size": 128,
                "lr": 0.1,
                "amp_dtype": "float32",
                "padding": 2,
            },
        ),
        ("study", ("--scale", "long"), "standard-2x", 2, {"epochs": 200, "val_interval": 200}),
        ("study", ("--scale", "long"), "random-bn-n1", 2, {"method": "random-bn", "groups": 1, "epsilon": 0.1}),
        ("study", ("--scale", "long"), "apart-sam-n1", 2, {"groups": 1, "epsilon": 0.1, "rho": 0.2, "epochs": 100}),
        ("table1", ("--scale", "small"), "apart-sam-mixup", 2, {"groups": 8, "epsilon": 0.1}),
        ("study", ("--scale", "small"), "apart-n1", 2, {"groups": 1}),
    ],
)
def test_rows_are_the_papers_settings(table, flags, row, cost, want):
    made = run_of(table, row, *flags, seed=3)
    assert made.cost == pytest.approx(cost) and made.config.seed == 3
    assert {key: getattr(made.config, key) for key in want} == want


def test_every_row_of_every_table_makes_a_run():
    made = 0
    for name, table in TABLES.items():
        for (dataset, model), rows in table.parts.items():
            for row in rows:
                found = run_of(name, row, "--dataset", dataset, "--model", model)
                assert found.config.dataset == dataset and found.config.model == model
                made += 1
    assert made == 4 * 9 + 8 + 6 + 14 + 13 and set(ROWS) == {
        row for table in TABLES.values() for rows in table.parts.values() for row in rows
    }


def test_one_name_is_one_training():
    """The rows that tables share are trained once."""
    assert run_of("table1", "apart") == run_of("table3", "apart")
    assert run_of("table1", "apart") != run_of("table1", "apart", "--", "--channels-last")


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


def test_shards_are_merged_and_nothing_is_run_twice(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "results"

    def reproduce(*flags):
        main(
            [
                "study",
                "--scale",
                "smoke",
                "--rows",
                "standard,apart-ratio0.25",
                "--seeds",
                "1",
                "--results",
                str(folder),
                "--output",
                str(tmp_path / "runs"),
                *flags,
            ]
        )
        return capfd.readouterr().out

    reproduce("--shard", "1/2")
    merged = reproduce("--shard", "2/2")
    results = read_results(folder)
    standard, apart = (results[f"cifar100-wide_resnet40_2-{row}-smoke-0"] for row in ("standard", "apart-ratio0.25"))
    assert standard["data"] == apart["data"] and (standard["cost"], apart["cost"]) == (1.0, 1.25)
    assert apart["settings"]["ratio"] == 0.25 and apart["versions"]["torch"] and "cores of" in apart["device"]
    last = json.loads((tmp_path / "runs" / apart["run"] / "metrics.jsonl").read_text().splitlines()[-1])
    assert apart["result"] == last
    difference = apart["result"]["top1"] - standard["result"]["top1"]
    assert f"| apart-ratio0.25 | 1.25x | 1 | {last['top1']:.2f} | {difference:+.2f} |  |  |  |" in merged
    assert merged.endswith((folder / "study-cifar100-wide_resnet40_2-smoke.md").read_text() + "\n")
    assert (folder / "study-cifar100-wide_resnet40_2-smoke.png").read_bytes().startswith(b"\x89PNG")
    command = shlex.split(apart["command"])
    assert command[:2] == ["python", "scripts/train.py"] and str(tmp_path) not in json.dumps(apart)
    assert parse_arguments(command[2:]).ratio == 0.25

    assert reproduce().startswith("Study, scale smoke")  # trains nothing
    gone = standard | {"run": "cifar100-wide_resnet40_2-tried-smoke-0", "row": "tried", "result": {"top1": 1.25}}
    others = [
        gone | {"run": f"{other}-0"} for other in ("cifar100-wide_resnet40_2-tried-small", "cifar100-x-tried-smoke")
    ]
    (folder / "gone.jsonl").write_text("".join(json.dumps(result) + "\n" for result in (gone, *others)))
    narrower = reproduce("--rows", "apart-ratio0.25", "--render")  # shows what is there all the same
    assert narrower.count("| tried |") == 1 and "| tried | 1.00x | 1 | 1.25 | " in narrower
    assert "| standard | 1.00x | 1 |" in narrower and f"{difference:+.2f}" in narrower
    with pytest.raises(SystemExit):
        reproduce("--", "--lr", "0.2")
    assert "with other settings (lr: 0.1, now 0.2)" in capfd.readouterr().err

    (folder / "gone.jsonl").unlink()
    for file in folder.glob("*.jsonl"):
        file.write_text(file.read_text().replace(standard["data"], "others"))
    with pytest.raises(SystemExit):
        reproduce("--rows", "ghost-bn")  # refused before it is trained
    said = capfd.readouterr()
    assert "what is left to run cannot stand in one table: data is others and" in said.err
    assert "ghost-bn" not in said.out
    assert not (tmp_path / "runs" / "cifar100-wide_resnet40_2-ghost-bn-smoke-0").exists()


@pytest.mark.parametrize("scale, seeds, left", [("small", 3, 6), ("medium", 2, 5)])
def test_the_results_kept_here_are_those_of_their_commands(scale, seeds, left, tmp_path, capsys):
    """Nothing is run again that is there, and the table is the one beside them."""
    kept = ROOT / "results"
    for file in kept.glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    main(["study", "--scale", scale, "--seeds", str(seeds), "--results", str(tmp_path), "--dry-run"])
    assert capsys.readouterr().out.count("python scripts/train.py") == left
    main(["study", "--scale", scale, "--results", str(tmp_path), "--render"])
    name = f"study-cifar100-wide_resnet16_2-{scale}.md"
    table = (tmp_path / name).read_text()
    assert table == (kept / name).read_text() and table in (ROOT / "docs/RESULTS.md").read_text()


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_table_that_was_stopped_goes_on(name, tmp_path):
    """The signal goes to the table's process alone."""
    table = [
        sys.executable,
        str(ROOT / "scripts" / "reproduce.py"),
        "study",
        "--scale",
        "smoke",
        "--rows",
        "standard",
        "--seeds",
        "2",
        "--results",
        str(tmp_path / "results"),
        "--output",
        str(tmp_path / "runs"),
        "--",
        "--max-steps",
        "200",
        "--epochs",
        "8",
    ]
    process = subprocess.Popen(table, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "cifar100-wide_resnet40_2-standard-smoke-0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == 75 and read_results(tmp_path / "results") == {}
    finished = run(*table)
    assert finished.returncode == 0 and "resumed from" in finished.stdout, finished.stderr
    results = read_results(tmp_path / "results")
    assert len(results) == 2 and all(result["result"]["epoch"] == 5 for result in results.values())


@pytest.mark.parametrize(
    "flags, message",
    [
        (("table1", "--rows", "standart"), "unknown row 'standart': did you mean 'standard'"),
        (
            ("table3", "--dataset", "imagenet"),
            "Table 3 has no part with --dataset imagenet --model None; it has --dataset "
            "cifar100 --model wide_resnet40_2.",
        ),
        (("table1", "--shard", "3/2"), "--shard '3/2': I/K with 1 <= I <= K"),
        (("table1", "--shard", "half"), "--shard 'half'"),
        (("table1", "--seeds", "0"), "--seeds 0: at least 1"),
        (("table1", "--scale", "small", "--data-dir", "nowhere", "--seeds", "1"), "--data-dir nowhere does not exist"),
        (("table1", "--seeds", "1", "--", "--nonsense"), "unrecognized arguments: --nonsense"),
        (("table1", "--", "--seed", "3"), "--seed after --: the table, its rows and --seeds decide that; leave it out"),
        (("table1", "--", "--val-fraction", "0.1"), "--val-fraction after --"),
        (("table3", "--rows", "apart-n1", "--", "--groups", "16"), "--groups after --"),
        (("table1", "--", "--model", "resnet18"), "--model after --"),
        (("table1", "--", "--every", "2"), "--every after --"),
        (("study", "--scale", "smoke", "--launcher", ""), "--launcher '': no command"),
        (("study", "--scale", "smoke", "--launcher", '"x'), "--launcher '\"x': No closing quotation"),
    ],
)
def test_bad_input(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(list(flags))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


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


def test_the_published_value_stands_beside_its_own_setting_only():
    run = run_of("table1", "standard", "--", "--channels-last", "--amp-dtype", "bfloat16")
    result = {"settings": json.loads(json.dumps(run.settings)), "processes": 1, "whole": True, "images": 50_000}
    assert is_published(run, result)
    for other in ({"processes": 4}, {"whole": False}, {"images": 5000}):
        assert not is_published(run, result | other)
    short = run_of("table1", "standard", "--", "--epochs", "10", "--decay-milestones", "5")
    assert not is_published(short, result | {"settings": short.settings})


def test_a_part_of_another_folder_is_another_part():
    places = [
        run_of("study", "standard", "--scale", "small", *where).places["data_dir"]
        for where in ((), ("--data-dir", "/a/data"), ("--data-dir", "/b/data"))
    ]
    assert len(set(places)) == 3


def test_a_part_in_smaller_images(tmp_path):
    folder = tmp_path / "part"
    reduce_data(DataSettings(), folder, classes=3, images=50, edge=7)
    whole, part = load(), load(data_dir=str(folder))
    assert part.class_names == whole.class_names[:3] and np.bincount(part.train.labels()).tolist() == [50] * 3
    of_classes = sum(int((split.labels() < 3).sum()) for split in (whole.train, whole.val))
    assert len(part.train) + len(part.val) == of_classes

    def pixels(split, edge):
        rows = [i for i, label in enumerate(split.labels()) if label < 3]
        images = [np.asarray(rgb(cell).resize((edge, edge), Image.Resampling.BOX)) for cell, _ in split.cells(rows)]
        return sorted(image.tobytes() for image in images)

    assert sorted(pixels(part.train, 7) + pixels(part.val, 7)) == sorted(pixels(whole.train, 7) + pixels(whole.val, 7))
    ((cell, label),) = part.val.cells([0])  # the first evaluation image of these classes, by plain means of squares
    first = next(i for i, label in enumerate(whole.val.labels()) if label < 3)
    ((original, same),) = whole.val.cells([first])
    means = np.asarray(rgb(original), dtype=float).reshape(7, 4, 7, 4, 3).mean((1, 3))
    assert label == same and np.abs(np.asarray(rgb(cell)) - means).max() <= 1  # rounded twice
    before = fingerprint(part)
    reduce_data(DataSettings(), folder, classes=3, images=60, edge=7)  # it is there already
    assert fingerprint(load(data_dir=str(folder))) == before
    reduce_data(DataSettings(), tmp_path / "other", classes=3, images=50, edge=14)
    assert fingerprint(load(data_dir=str(tmp_path / "other"))) != before
    with pytest.raises(ApartError, match=r"has 10 classes, .* this scale needs 20 with more than 250"):
        reduce_data(DataSettings(), tmp_path / "more", classes=20, images=250, edge=16)
    assert {path.name for path in tmp_path.iterdir()} == {"part", "other"}
