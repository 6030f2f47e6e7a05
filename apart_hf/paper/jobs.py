"""The runs that tables are made of: which training stands behind a row and a seed, and whether a result is its own."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apart_hf.config.arguments import parse_arguments
from apart_hf.config.defaults import fill_defaults, plain_epochs
from apart_hf.config.passes import mean_passes
from apart_hf.config.train_config import SETTINGS, FilledConfig, TrainConfig
from apart_hf.data import DATASETS
from apart_hf.errors import ApartError
from apart_hf.paper.request import TableRequest
from apart_hf.paper.scales import SCALES, Reduction
from apart_hf.paper.tables import ROWS, recipe_name
from apart_hf.strategies.methods import METHODS


@dataclass(frozen=True)
class Job:
    """Describes one training of a table.

    Args:
        name: also its result's.
        row: of the table.
        seed: of the training.
        flags: flags of `train`, by table, row, seed and scale.
        more: further ones, that all runs are given.
        places: settings that say where the data are and where the run goes.
    """

    name: str
    row: str
    seed: int
    flags: list[str]
    more: list[str]
    places: dict[str, str]

    @property
    def arguments(self) -> list[str]:
        """Return the command line of `train`."""
        return [*self.flags, *self.more, *flags_of(self.places)]

    @property
    def config(self) -> FilledConfig:
        return fill_defaults(parse_arguments(self.arguments))

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that decide the result."""
        settings, found = dataclasses.asdict(self.config), {}
        for key, known in SETTINGS.items():
            idle = known.idle_without is not None and settings[known.idle_without] is None
            if known.on_resume != "free" and not idle:
                found[key] = settings[key]
        return found

    @property
    def cost(self) -> float:
        """Count the passes over the data, in units of those of the recipe's plain training."""
        config, given = self.config, parse_arguments(self.arguments)
        return mean_passes(config) * config.run_epochs / plain_epochs(given)


def setting(request: TableRequest, dataset: str, model: str) -> str:
    """Name dataset and model as runs and tables do; a scale may take another model on the same data."""
    scale = SCALES[request.scale].settings
    return f"{dataset}-{model if 'dataset' in scale else scale.get('model', model)}"


def make_job(request: TableRequest, dataset: str, model: str, row: str, seed: int) -> Job:
    """Make the run of a row and a seed.

    Raises:
        ApartError: where the flags for every run set what is the table's.
    """
    scale, known = SCALES[request.scale], ROWS[row]
    name = f"{setting(request, dataset, model)}-{row}-{request.scale}-{seed}"
    settings: dict[str, Any] = {"recipe": recipe_name(dataset, model, known), "seed": seed}
    settings |= {} if known.budget is None else {"budget": known.budget}
    settings |= scale.settings | known.settings
    method = settings.get("method", known.recipe.removesuffix("-mixup"))
    if scale.groups is not None and "groups" in METHODS[method].hyper_parameters():
        settings.setdefault("groups", scale.groups)
    if known.plain_share:
        epochs = fill_defaults(parse_arguments([*flags_of(settings), *request.more])).epochs
        settings["perturb_from_epoch"] = 1 + round(known.plain_share * epochs)
    flags = flags_of(settings)
    _check_more(flags, list(request.more))
    places = {"output": str(request.output), "experiment": name, "resume": "auto"}
    if scale.reduction is not None:
        places["data_dir"] = str(_reduced(request, dataset, scale.reduction))
    elif request.data_dir is not None:
        places["data_dir"] = request.data_dir
    return Job(name, row, seed, flags, list(request.more), places)


def _reduced(request: TableRequest, dataset: str, part: Reduction) -> Path:
    source = dataset
    if request.data_dir is not None:  # another folder is other data
        source += f"-{hashlib.sha256(str(Path(request.data_dir).resolve()).encode()).hexdigest()[:8]}"
    return request.output / f"{source}-{part.classes}x{part.images}-{part.edge}px"


def flags_of(settings: dict[str, Any]) -> list[str]:
    found = []
    for key, value in settings.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        found += [SETTINGS[key].flag, *map(str, values)]
    return found


def _check_more(flags: list[str], more: list[str]) -> None:
    plain, full = parse_arguments(flags), parse_arguments([*flags, *more])
    for key, setting in SETTINGS.items():
        if not setting.in_tables and getattr(plain, key) != getattr(full, key):
            raise ApartError(f"{setting.flag} after --: the table, its rows and --seeds decide that; leave it out.")


def differing(run: Job, result: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which a result differs from a run: (the result's, the run's)."""
    before = dataclasses.asdict(TrainConfig()) | result["settings"]  # options that came later had their defaults
    return {key: (before[key], now) for key, now in run.settings.items() if before[key] != now}


def changed(run: Job, result: dict[str, Any]) -> str:
    """Say in words what `differing` returns."""
    return ", ".join(f"{key}: {before}, now {now}" for key, (before, now) in differing(run, result).items())


def extra(run: Job, result: dict[str, Any]) -> dict[str, Any]:
    """Return what a result was computed with beyond its row and scale: settings of what is computed, not how."""
    found = differing(dataclasses.replace(run, more=[]), result)
    return {key: before for key, (before, _) in found.items() if SETTINGS[key].role != "how"}


def is_published(run: Job, result: dict[str, Any]) -> bool:
    """Tell whether a result is of the paper's settings and of a dataset's own images, as many as it has."""
    own = result.get("whole") and result.get("images") == DATASETS[run.config.dataset].train_size
    return bool(own) and not extra(run, result) and result["processes"] == 1


def unknown_rows(results: Iterable[dict[str, Any]], where: str, scale: str) -> list[dict[str, Any]]:
    """List the results of a setting and scale whose rows are in no table: methods that were tried and not kept."""
    return [
        result
        for result in results
        if result["row"] not in ROWS and result["run"] == f"{where}-{result['row']}-{scale}-{result['seed']}"
    ]


def check_together(results: Iterable[dict[str, Any]]) -> None:
    """Raise ApartError where results of one table were made of other images, in another arithmetic, or with other flags
    beyond their rows' (`extra`). Each is compared in what it has of these."""
    first: dict[str, dict[str, Any]] = {}
    for result in results:
        for key in ("data", "amp_dtype", "processes", "extra"):
            if key not in result:
                continue
            other = first.setdefault(key, result)
            if other[key] != result[key]:
                what = "what they have beyond their rows" if key == "extra" else key
                raise ApartError(
                    f"{other['run']} and {result['run']} cannot stand in one table: {what} is {other[key]} and "
                    f"{result[key]}; keep such results in folders of their own, by --results."
                )
