"""Tables by command: runs are made once, shared between machines, stopped and gone on with."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from apart_hf.cli.reproduce import main
from apart_hf.cli.train import main as train_command
from apart_hf.config.arguments import parse_arguments
from apart_hf.paper.results import read_results
from tests.support.helpers import ROOT, run


def in_this_process(command):
    assert command[1:4] == ["-m", "apart_hf", "train"]
    train_command(command[4:])
    return 0, False


@pytest.mark.process
def test_shards_are_merged_and_nothing_is_run_twice(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "results"

    def reproduce(*flags):
        rows = "study --scale smoke --rows standard,apart-ratio0.25 --seeds 1"
        main([*rows.split(), "--results", str(folder), "--output", str(tmp_path / "runs"), *flags])
        return capfd.readouterr().out

    reproduce("--shard", "1/2")  # by a process of its own, as always
    monkeypatch.setattr("apart_hf.paper.reproduce._start", in_this_process)
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
    assert command[:2] == ["apart-hf", "train"] and str(tmp_path) not in json.dumps(apart)
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


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_table_that_was_stopped_goes_on(name, tmp_path):
    """The signal goes to the table's process alone."""
    places = ["--results", str(tmp_path / "results"), "--output", str(tmp_path / "runs")]
    flags = ["study", "--scale", "smoke", "--rows", "standard", "--seeds", "2"], ["--max-steps", "200", "--epochs", "8"]
    table = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), *flags[0], *places, "--", *flags[1]]
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
        (("table1", "--seeds", "1", "--", "--nonsense"), "reproduce.py: error: unrecognized arguments: --nonsense"),
        (("table1", "--dry-run", "--", "--jsd-loss"), "reproduce.py: error: --jsd-loss of timm is not taken"),
        (("table1", "--", "--seed", "3"), "--seed after --: the table, its rows and --seeds decide that; leave it out"),
        (("table1", "--", "--val-fraction", "0.1"), "--val-fraction after --"),
        (("table3", "--rows", "apart-n1", "--", "--groups", "16"), "--groups after --"),
        (("table1", "--", "--model", "resnet18"), "--model after --"),
        (("table1", "--", "--every", "2"), "--every after --"),
        (("study", "--scale", "smoke", "--time-limit", "soon"), "--time-limit 'soon': a whole number above 0"),
        (("study", "--scale", "smoke", "--launcher", ""), "--launcher '': no command"),
        (("study", "--scale", "smoke", "--launcher", '"x'), "--launcher '\"x': No closing quotation"),
    ],
)
def test_bad_input(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(list(flags), prog="reproduce.py")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1 and error.startswith("reproduce.py: ")
    assert not any(tmp_path.iterdir())


def limited(tmp_path, *flags):
    rows = "study --scale smoke --rows standard,sam,apart --seeds 1"
    main([*rows.split(), "--results", str(tmp_path / "results"), "--output", str(tmp_path / "runs"), *flags])


@pytest.mark.parametrize(
    "launcher, kept, total",
    # of the last case 6 s are left, and a process takes 7 to start
    [([], 2, 92), (["--launcher", "torchrun --nproc-per-node 1"], 12, 92), ([], 2, 99)],
)
def test_a_limit_is_over_all_runs(launcher, kept, total, tmp_path, monkeypatch, capsys):
    """Each run gets what is left of the time since the start of this process, and none is begun without any."""
    given, clock = [], [0.0]
    monkeypatch.setattr("apart_hf.runs.time_limit.age", lambda: 7.0)
    monkeypatch.setattr("apart_hf.runs.time_limit.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("apart_hf.paper.reproduce._result", lambda job, *_: {"run": job.name})
    monkeypatch.setattr("apart_hf.paper.reproduce.add_result", lambda *_: None)

    def start(command):
        given.append(command[-2:])
        clock[0] += 42.0
        return 0, False

    monkeypatch.setattr("apart_hf.paper.reproduce._start", start)
    with pytest.raises(SystemExit) as ended:
        limited(tmp_path, "--time-limit", f"{total}s", *launcher)
    assert given == [["--time-limit", f"{total - 7 - used - kept}s"] for used in (0, 42)]
    error = capsys.readouterr().err
    assert ended.value.code == 75 and error.count("\n") == 1
    name = "cifar100-wide_resnet40_2-apart-smoke-0"
    assert f"stopped by --time-limit {total}s before {name}; 1 of 3 runs are left. To go on: the same command." in error


def test_a_run_that_its_limit_stopped_stops_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("apart_hf.paper.reproduce._start", lambda command: (75, False))
    with pytest.raises(SystemExit) as ended:
        limited(tmp_path, "--time-limit", "100h")
    assert ended.value.code == 75 and read_results(tmp_path / "results") == {}
    assert "standard-smoke-0 was stopped; 3 of 3 runs are left. To go on: the same" in capsys.readouterr().err
