"""What is asked of a table: which of its runs, how large, on which data, and where they and their results go."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from apart_hf.config.durations import seconds_of
from apart_hf.errors import ApartError, unknown_name
from apart_hf.paper.scales import SCALES
from apart_hf.paper.tables import TABLES


@dataclass(frozen=True)
class TableRequest:
    """Asks for a part of a table's runs.

    Args:
        table: "table1", "table2", "table3" or "study".
        dataset, model: of the table's column; None: its first.
        rows: their names; None: all.
        seeds: seeds 0 to seeds - 1 of each row.
        scale: a name of `scales.SCALES`.
        data_dir: local folder with the dataset; None: the Hub's.
        part, parts: the runs part, part + parts, ... are made, with part from 0.
        results: every *.jsonl in this folder is read; new results and the table go there.
        output: folder of the runs.
        launcher: the command that starts a run, in words; its batch size is that of a process.
        more: further flags of `train`, for every run.
        time_limit: for all runs together, from the start of this process on, such as "10m"; None: there is none.

    Raises:
        ApartError: for an unknown table or scale, or numbers out of range.
    """

    table: str
    dataset: str | None = None
    model: str | None = None
    rows: tuple[str, ...] | None = None
    seeds: int = 5
    scale: str = "full"
    data_dir: str | None = None
    part: int = 0
    parts: int = 1
    results: Path = Path("results")
    output: Path = Path("output/reproduce")
    launcher: tuple[str, ...] = (sys.executable,)
    more: tuple[str, ...] = ()
    time_limit: str | None = None

    def __post_init__(self) -> None:
        if self.table not in TABLES:
            raise unknown_name("table", self.table, TABLES)
        if self.scale not in SCALES:
            raise unknown_name("scale", self.scale, SCALES)
        if self.seeds < 1:
            raise ApartError(f"--seeds {self.seeds}: at least 1.")
        if not 0 <= self.part < self.parts:
            raise ApartError(f"--shard '{self.part + 1}/{self.parts}': I/K with 1 <= I <= K, for instance 2/3.")
        if self.time_limit is not None:
            seconds_of("--time-limit", self.time_limit)
