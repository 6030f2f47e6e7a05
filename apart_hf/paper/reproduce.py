"""Runs of a table, each in a process of its own; their results, and the table that is made of them."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from apart_hf.config.durations import seconds_of
from apart_hf.config.train_config import TrainConfig
from apart_hf.data import load_image_data
from apart_hf.data.fingerprint import fingerprint
from apart_hf.errors import ApartError
from apart_hf.hub.model_folder import Exported
from apart_hf.hub.pretrained import load_pretrained
from apart_hf.hub.training_record import DataRecord
from apart_hf.paper.corrupted_part import corrupted_part
from apart_hf.paper.corruptions import CorruptedImages
from apart_hf.paper.jobs import Job, changed, check_together, flags_of, make_job
from apart_hf.paper.measures import LOGITS, measure
from apart_hf.paper.render import render_table, results_shown, table_name
from apart_hf.paper.request import TableRequest
from apart_hf.paper.results import add_result, read_results
from apart_hf.paper.scales import SCALES
from apart_hf.paper.subset import reduce_data
from apart_hf.paper.tables import TABLES, chosen_rows
from apart_hf.runs.components import data_settings
from apart_hf.runs.interruption import EXIT_CODE, Interrupted
from apart_hf.runs.time_limit import TimeLimit
from apart_hf.utils.allocator import keep_freed_memory
from apart_hf.utils.environment import device_name, versions
from apart_hf.utils.processes import SIGNALS, use_threads

COMMAND = ("-m", "apart_hf", "train")
HANDING_OVER = (
    2.0  # seconds of a limit that are kept: a run's interpreter starts after it is called, and ends before us
)
LAUNCHING = 10.0  # further seconds that a launcher takes before it starts the run's processes
_log = logging.getLogger(__name__)


def reproduce(request: TableRequest) -> str:
    """Make those runs of a table that have no result yet, record each, and render the table.

    Args:
        request: which runs.

    Returns:
        The table, see `render_table`.

    Raises:
        ApartError: before the first run, where results could not stand in one table; at the end, where runs failed.
        Interrupted: where a run, or this process, was asked to stop; the same request goes on.
    """
    left = jobs_left(request)
    failed = _train(request, left) if left else []
    text = render_table(request)
    if failed:
        raise ApartError(
            f"{len(failed)} of {len(left)} runs failed: {', '.join(failed)}; the same command tries them again."
        )
    return text


def jobs_left(request: TableRequest) -> list[Job]:
    """List the runs that are asked for and have no result.

    Raises:
        ApartError: where a result is of other settings.
    """
    (dataset, model), published = TABLES[request.table].part(request.dataset, request.model)
    wanted, results = chosen_rows(published, request.rows), read_results(request.results)
    jobs = [make_job(request, dataset, model, row, seed) for seed in range(request.seeds) for row in wanted]
    for job in jobs:
        if job.name in results and (differs := changed(job, results[job.name])):
            raise ApartError(
                f"{request.results} holds {job.name} with other settings ({differs}); name them as before, "
                "or another --results."
            )
    return [job for job in jobs[request.part :: request.parts] if job.name not in results]


def _train(request: TableRequest, jobs: list[Job]) -> list[str]:
    """Make the runs one after another, and record each. Returns the names of those that failed."""
    if not request.launcher:
        raise ApartError("--launcher '': no command; leave the flag out for this Python.")
    first = jobs[0].config
    data = _prepared_data(request, first)
    own = {"run": "what is left to run", "data": data}
    own |= {} if first.amp_dtype is None else {"amp_dtype": first.amp_dtype}
    check_together([*results_shown(request), own])
    try:
        request.results.mkdir(parents=True, exist_ok=True)  # rather now than when the first run is done
    except OSError as error:
        raise ApartError(f"cannot write {request.results}: {error.strerror}; choose another --results.") from error
    corrupted = corrupted_part(request, first)
    part = "" if request.parts == 1 else f"-{request.part + 1}of{request.parts}"
    file = request.results / f"{table_name(request)}{part}.jsonl"
    limit = None if request.time_limit is None else TimeLimit(seconds_of("", request.time_limit), request.time_limit)
    failed = []
    for number, job in enumerate(jobs, start=1):
        left = f"{len(jobs) - number + 1} of {len(jobs)} runs are left."
        limited = [] if limit is None else _limited(request, limit, f"before {job.name}; {left}")
        _log.info("[%d/%d] %s", number, len(jobs), job.name)
        code, stopped = _start([*request.launcher, *COMMAND, *job.arguments, *limited])
        if code == 0:
            result = _result(job, request.output / job.name, data)
            if corrupted is not None:
                result["measures"] = _measures(job, request.output / job.name, corrupted)
            add_result(file, result)
        if stopped or code == EXIT_CODE:
            raise Interrupted(f"{job.name} was stopped; {left}")
        if code:
            failed.append(job.name)
    return failed


def _limited(request: TableRequest, limit: TimeLimit, where: str) -> list[str]:
    """Return the flags that give a run what is left of the time.

    Raises:
        Interrupted: where less is left than a process takes to start.
    """
    seconds = int(limit.left - HANDING_OVER - (LAUNCHING if request.launcher != (sys.executable,) else 0.0))
    if seconds < max(1.0, limit.start_up):
        raise Interrupted(f"stopped by --time-limit {limit.text} {where}")
    return ["--time-limit", f"{seconds}s"]


def _prepared_data(request: TableRequest, config: TrainConfig) -> str:
    """Make the scale's part of the dataset, where it takes one, and hash what runs are trained on."""
    reduction = SCALES[request.scale].reduction
    if reduction is not None:
        assert config.data_dir is not None  # `make_job` names a folder for each reduction
        whole = dataclasses.replace(data_settings(config), data_dir=request.data_dir)
        reduce_data(whole, Path(config.data_dir), **dataclasses.asdict(reduction))
    return fingerprint(load_image_data(data_settings(config)))


def _measures(job: Job, folder: Path, corrupted: CorruptedImages) -> dict[str, Any]:
    config = job.config
    if not config.no_mallopt:
        keep_freed_memory()
    use_threads(config.threads, local_processes=1)
    _log.info("measuring %s", job.name)
    model, _ = load_pretrained(str(folder))
    return measure(model, load_image_data(data_settings(config)), corrupted, folder / LOGITS)


def _start(command: list[str]) -> tuple[int, bool]:
    """Run a command to its end. Returns its exit code, and whether a signal asked us to stop, which it was handed."""
    try:
        # in a group of its own: a terminal would signal both
        process, stopped = subprocess.Popen(command, process_group=0), []
    except OSError as error:
        raise ApartError(f"--launcher: cannot start {command[0]}: {error.strerror}.") from error

    def hand_on(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        return process.wait(), bool(stopped)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _result(job: Job, folder: Path, data: str) -> dict[str, Any]:
    """Return what is kept of a finished run."""
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    trained = Exported.read(folder).training
    data_record = trained.data or DataRecord()
    source = {"data_dir": Path(job.places["data_dir"]).name} if "data_dir" in job.places else {}
    return {
        "run": job.name,
        "row": job.row,
        "seed": job.seed,
        "cost": job.cost,
        "result": last,
        "settings": job.settings,
        "amp_dtype": trained.settings["amp_dtype"],
        "processes": trained.settings.get("processes", 1),
        "command": shlex.join(["apart-hf", "train", *job.flags, *job.more, *flags_of(source)]),
        "data": data,
        "whole": data_record.whole,
        "images": data_record.images,
        "device": device_name(),
        "versions": versions(),
        "commit": trained.commit,
    }
