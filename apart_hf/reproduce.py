"""The command that reproduces a table: python scripts/reproduce.py table1 --rows standard,apart --seeds 5

Each run is `apart_hf.train` in a process of its own, resumed where it was cut off, skipped where its result is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apart_hf.command_line import Parser, run_command
from apart_hf.comparisons import compare, render_comparisons
from apart_hf.config import TrainConfig
from apart_hf.corruptions import CorruptedImages, check_installed, corrupt_images
from apart_hf.data import load_image_data
from apart_hf.data.fingerprint import fingerprint
from apart_hf.data.reduced import evaluation_images, reduce_data
from apart_hf.errors import ApartError
from apart_hf.interruption import EXIT_CODE
from apart_hf.measures import LOGITS, measure
from apart_hf.plots import plot_gains
from apart_hf.pretrained import load_pretrained
from apart_hf.results import Difference, Line, add_result, read_results, render
from apart_hf.runtime import device_name, versions
from apart_hf.signals import SIGNALS
from apart_hf.table_runs import (
    Run,
    changed,
    check_together,
    extra,
    flags_of,
    is_published,
    make_run,
    setting,
    unknown_rows,
)
from apart_hf.tables import ROWS, SCALES, TABLES, Published, chosen_rows
from apart_hf.train import data_settings

MODULE = "apart_hf.train"


def main(arguments: list[str] | None = None) -> None:
    """Bad input ends in one line and exit code 2; a stop that can be resumed in 75."""
    run_command(lambda prog: _run(_arguments(arguments, prog)))


def _arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = Parser(
        prog=prog, description="Run a table's rows and render it. What is there already is not run again.",
        epilog="After --: flags of train.py for every run, for instance -- --channels-last --amp-dtype bfloat16.",
    )
    parser.add_argument("table", choices=TABLES, help="of the paper; study: what the parts of a method are worth")
    parser.add_argument("--dataset", metavar="NAME", help="[the table's first]")
    parser.add_argument("--model", metavar="NAME", help="of the table's column [its first]")
    parser.add_argument("--rows", metavar="NAME,...", help="[all]: " + ", ".join(ROWS))
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N-1 of each row [5]")
    parser.add_argument("--scale", choices=SCALES, default="full",
                        help="; ".join(f"{name}: {scale.summary}" for name, scale in SCALES.items()) + " [full]")
    parser.add_argument("--data-dir", metavar="DIR", help="local folder with the dataset")
    parser.add_argument("--shard", default="1/1", metavar="I/K", help="the I-th of K parts of the runs [1/1]")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR",
                        help="all *.jsonl in it are read; new results and the table go there [results]")
    parser.add_argument("--output", type=Path, default=Path("output/reproduce"), metavar="DIR",
                        help="folder of the runs [output/reproduce]")
    parser.add_argument("--launcher", default=sys.executable, metavar="COMMAND",
                        help='starts a run, for instance "accelerate launch --multi_gpu"; the batch size is that of a '
                        "process [this Python]")
    parser.add_argument("--render", action="store_true", help="only render what is there")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands of what is left to run; a part "
                        "of a dataset, which a scale may take, is made by the first run")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    found = parser.parse_args(arguments[:cut])
    found.more = arguments[cut + 1 :]
    if found.seeds < 1:
        raise ApartError(f"--seeds {found.seeds}: at least 1.")
    return found


def _run(args: argparse.Namespace) -> None:
    (dataset, model), published = TABLES[args.table].part(args.dataset, args.model)
    part, parts = _shard(args.shard)
    wanted, results = chosen_rows(published, args.rows), read_results(args.results)

    def run_of(row: str, seed: int) -> Run:
        return make_run(args, dataset, model, row, seed)

    runs = [run_of(row, seed) for seed in range(args.seeds) for row in wanted]
    for run in runs:
        if run.name in results and not args.render and (differs := changed(run, results[run.name])):
            raise ApartError(f"{args.results} holds {run.name} with other settings ({differs}); name them as before, "
                             "or another --results.")
    mine = [run for run in runs[part::parts] if run.name not in results]
    if args.dry_run:
        for run in mine:
            print(shlex.join(["python", "scripts/train.py", *run.arguments]))
        return
    where = setting(args, dataset, model)
    name = f"{args.table}-{where}-{args.scale}"
    failed = []
    if not args.render:
        known = [run_of(row, seed) for row in published for seed in _seeds(results)]
        shown = [_seen(run, results[run.name]) for run in known if run.name in results]
        failed = _train(args, mine, name if parts == 1 else f"{name}-{part + 1}of{parts}", shown)
    results = read_results(args.results)
    tried = unknown_rows(results.values(), where, args.scale)
    runs = [run_of(row, seed) for row in published for seed in _seeds(results)]
    _show(args, name, runs, results, published, tried)
    if failed:
        raise ApartError(f"{len(failed)} of {len(mine)} runs failed: {', '.join(failed)}; the same command tries them "
                         "again.")


def _seeds(results: dict[str, dict[str, Any]]) -> list[int]:
    """Also those of earlier commands; at least one."""
    return sorted({result["seed"] for result in results.values()}) or [0]


def _seen(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """A result with what it was computed with beyond its row."""
    return result | {"extra": extra(run, result)}


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ApartError(f"--shard {text!r}: I/K with 1 <= I <= K, for instance 2/3.")
    return int(part) - 1, int(parts)


def _train(args: argparse.Namespace, runs: list[Run], name: str, there: list[dict[str, Any]]) -> list[str]:
    """Train what is left, one after another, and record each. Returns the names of those that failed.

    Raises: ApartError before the first one, where their results could not stand in one table with those that are there.
    """
    if not runs:
        return []
    try:
        launcher = shlex.split(args.launcher)
    except ValueError as error:
        raise ApartError(f"--launcher {args.launcher!r}: {error}.") from error
    if not launcher:
        raise ApartError("--launcher '': no command; leave the flag out for this Python.")
    reduction, first = SCALES[args.scale].reduction, runs[0].config
    if reduction is not None:
        whole = dataclasses.replace(first, data_dir=args.data_dir)
        reduce_data(data_settings(whole), Path(first.data_dir), **dataclasses.asdict(reduction))
    data = fingerprint(load_image_data(data_settings(first)))
    own = {"run": "what is left to run", "data": data}
    own |= {} if first.amp_dtype is None else {"amp_dtype": first.amp_dtype}
    check_together([*there, own])
    try:
        args.results.mkdir(parents=True, exist_ok=True)  # rather now than when the first run is done
    except OSError as error:
        raise ApartError(f"cannot write {args.results}: {error.strerror}; choose another --results.") from error
    corrupted = _corrupted(args, first)
    failed = []
    for number, run in enumerate(runs, start=1):
        print(f"[{number}/{len(runs)}] {run.name}", flush=True)
        code, stopped = _start([*launcher, "-m", MODULE, *run.arguments])
        if code == 0:
            result = _result(run, args.output / run.name, data)
            if corrupted is not None:
                result["measures"] = _measures(run, args.output / run.name, corrupted)
            add_result(args.results / f"{name}.jsonl", result)
        if stopped or code == EXIT_CODE:
            sys.exit(EXIT_CODE)
        if code:
            failed.append(run.name)
    return failed


def _corrupted(args: argparse.Namespace, config: TrainConfig) -> CorruptedImages | None:
    """The scale's corrupted images, made once and kept beside the runs; None: it has none."""
    scale = SCALES[args.scale]
    if not scale.corruptions:
        return None
    file = Path(f"{config.data_dir}-corrupted.npz")
    if file.exists():
        return CorruptedImages.load(file)
    check_installed()
    print(f"making {file}: {scale.corruptions} images under 15 corruptions and {len(scale.severities)} severities",
          flush=True)
    part = scale.reduction
    evaluated = len(load_image_data(data_settings(config)).val)
    chosen = np.sort(np.random.default_rng(0).permutation(evaluated)[: scale.corruptions])
    whole = data_settings(dataclasses.replace(config, data_dir=args.data_dir))
    images, labels = evaluation_images(whole, classes=part.classes, images=part.images, chosen=chosen.tolist())
    found = corrupt_images(images, labels, severities=scale.severities, edge=part.edge)
    found.save(file)
    return found


def _measures(run: Run, folder: Path, corrupted: CorruptedImages) -> dict[str, Any]:
    config = run.config
    torch.set_num_threads(config.threads)
    print(f"measuring {run.name}", flush=True)
    model, _ = load_pretrained(str(folder))
    return measure(model, load_image_data(data_settings(config)), corrupted, folder / LOGITS)


def _start(command: list[str]) -> tuple[int, bool]:
    """Run a command to its end. Returns its exit code, and whether a signal asked us to stop, which it was handed."""
    try:
        # in a group of its own: a terminal would signal both
        process, stopped = subprocess.Popen(command, process_group=0), []
    except OSError as error:
        raise ApartError(f"--launcher: cannot start {command[0]}: {error.strerror}.") from error

    def hand_on(number: int, frame) -> None:
        stopped.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        return process.wait(), bool(stopped)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _result(run: Run, folder: Path, data: str) -> dict[str, Any]:
    """What is kept of a finished run."""
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    trained = json.loads((folder / "last" / "config.json").read_text())["apart"]
    source = {"data_dir": Path(run.places["data_dir"]).name} if "data_dir" in run.places else {}
    return {
        "run": run.name, "row": run.row, "seed": run.seed, "cost": run.cost, "result": last, "settings": run.settings,
        "amp_dtype": trained["settings"]["amp_dtype"], "processes": trained["settings"].get("processes", 1),
        "command": shlex.join(["python", "scripts/train.py", *run.flags, *run.more, *flags_of(source)]), "data": data,
        "whole": trained["data"]["whole"], "images": trained["data"]["images"],
        "device": device_name(), "versions": versions(), "commit": trained["commit"],
    }


def _show(
    args: argparse.Namespace, name: str, runs: list[Run], results: dict[str, dict[str, Any]],
    published: dict[str, Published | None], tried: list[dict[str, Any]],
) -> None:
    """Print the table and write it, with a plot of gains over costs, beside the results. `tried` are further results,
    for the table alone."""
    there = [run for run in runs if run.name in results]
    check_together([*(_seen(run, results[run.name]) for run in there), *tried])
    title = f"{TABLES[args.table].title}, scale {args.scale}"
    strange = [run.row for run in there if not is_published(run, results[run.name])]
    if args.scale != "full":
        published = dict.fromkeys(published)  # they are of other settings
    elif strange:
        published = published | dict.fromkeys(strange)
        print(f"no published value beside {', '.join(dict.fromkeys(strange))}: of other settings, images or numbers of "
              "processes than the paper's")
    lines = [
        Line(row, {run.seed: results[run.name]["result"]["top1"] for run in there if run.row == row},
             next(run.cost for run in runs if run.row == row), published[row])
        for row in published
    ]
    more = [
        Line(row, {result["seed"]: result["result"]["top1"] for result in tried if result["row"] == row}, cost, None)
        for row, cost in {result["row"]: result["cost"] for result in tried}.items()
    ]
    table = render([*lines, *more], TABLES[args.table].against)
    print(f"{title}: top-1 accuracy, mean ± standard deviation over seeds; differences are paired by seed, ± 95 % "
          f"confidence\n\n{table}", flush=True)
    if not there:
        return
    tested = SCALES[args.scale].tested
    compared = render_comparisons(compare({line.name: line.accuracies for line in lines}, tested), len(tested))
    if compared:
        print(compared, flush=True)
        table += f"\n{compared}"
    file = args.results / f"{name}.md"
    standard = next((line.accuracies for line in lines if line.name == "standard"), {})
    gains = [(line.name, line.cost, gain) for line in lines if line.name != "standard"
             and (gain := Difference.of(line.accuracies, standard)) is not None]
    try:
        file.write_text(table)
        if gains:
            plot_gains(gains, file.with_suffix(".png"), title)
    except OSError as error:
        raise ApartError(f"cannot write {file} and its plot: {error.strerror}; make room, or move it away.") from error


if __name__ == "__main__":
    main()
