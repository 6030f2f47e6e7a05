"""The paper's Tables 1 to 3 and our study as data: rows and published accuracies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from apart_hf.config.recipes import RECIPES
from apart_hf.errors import ApartError, unknown_name

#: (mean, standard deviation over runs) of the test accuracy in per cent; the paper gives no deviation in Table 2
Published = tuple[float, float | None]


@dataclass(frozen=True)
class Row:
    """Describes one line of a table.

    Args:
        recipe: METHOD or METHOD-mixup of a recipe's name.
        budget: cost in units of the recipe's plain training, see `passes.budgeted`; None: that of as many epochs.
        settings: of `TrainConfig`, beyond the recipe's.
        plain_share: the share of the epochs, from the first on, that are without second passes.
    """

    recipe: str
    budget: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    plain_share: float = 0.0


def _apart(**settings: Any) -> Row:
    """Make a row of Table 3, which uses as many epochs throughout, so that a smaller N is cheaper."""
    return Row("apart", None, settings)


#: by name; a name stands for the same training in every table
ROWS: dict[str, Row] = {
    "standard": Row("standard", 1),
    "standard-1.2x": Row("standard", 1.2),
    "standard-2x": Row("standard", 2),
    "standard-4x": Row("standard", 4),
    "sam": Row("sam", 2),
    "apart": Row("apart", 2),
    "apart-4x": Row("apart", 4),
    "apart-sam": Row("apart-sam", 2),
    "standard-mixup": Row("standard-mixup", 1),
    "standard-mixup-2x": Row("standard-mixup", 2),
    "apart-mixup": Row("apart-mixup", 2),
    "apart-sam-mixup": Row("apart-sam-mixup", 2),
    "apart-N24-n1": _apart(ratio=24 / 128, groups=1),
    "apart-N24-n2": _apart(ratio=24 / 128, groups=2),
    "apart-N24-n8": _apart(ratio=24 / 128, groups=8),
    "apart-eps0.05-n8": _apart(epsilon=0.05, groups=8),
    "apart-eps0.1-n8": _apart(epsilon=0.1, groups=8),
    "apart-eps0.2-n8": _apart(epsilon=0.2, groups=8),
    "apart-eps0.4-n8": _apart(epsilon=0.4, groups=8),
    "apart-n1": _apart(groups=1),
    "apart-n2": _apart(groups=2),
    "apart-n32": _apart(groups=32),
    # the study: which part of the gain is adversarial, and what a cheaper second pass keeps
    "ghost-bn": Row("standard", None, {"method": "ghost-bn"}),
    "random-bn": Row("standard", None, {"method": "random-bn", "epsilon": 0.1}),
    "random-bn-n1": Row("standard", None, {"method": "random-bn", "epsilon": 0.1, "groups": 1}),
    "sam-on": Row("standard", None, {"method": "sam-on"}),
    "apart-sam-n1": Row("apart-sam", None, {"groups": 1}),
    "apart-every2": _apart(every=2),
    "apart-ratio0.25": _apart(ratio=0.25),
    # of its second part: networks that still learn lose by the attack
    "apart-last-half": Row("apart", plain_share=0.5),
    # other adversaries, by their own defaults and for as many epochs, so that each has the cost that its steps have
    "gsam": Row("standard", None, {"method": "gsam"}),
    "awp": Row("standard", None, {"method": "awp"}),
    "advprop": Row("standard", None, {"method": "advprop"}),
    "advprop-k1": Row("standard", None, {"method": "advprop", "steps": 1}),
    "fast-advprop": Row("standard", None, {"method": "fast-advprop"}),
    "advbn": Row("standard", None, {"method": "advbn"}),
}
_TABLE_1 = (
    "standard",
    "standard-2x",
    "sam",
    "apart",
    "apart-sam",
    "standard-mixup",
    "standard-mixup-2x",
    "apart-mixup",
    "apart-sam-mixup",
)


def _published(rows: tuple[str, ...], means: str, deviations: str | None = None) -> dict[str, Published | None]:
    found = [float(value) for value in means.split()]
    spread = [None] * len(found) if deviations is None else [float(value) for value in deviations.split()]
    return dict(zip(rows, zip(found, spread), strict=True))


@dataclass(frozen=True)
class Table:
    """Holds a table's rows, and what was published of them.

    Args:
        title: of it.
        parts: for each (dataset, model) its rows, each with the published accuracy; None: none was published.
        against: the rows that others are compared with, seed by seed.
    """

    title: str
    parts: dict[tuple[str, str], dict[str, Published | None]]
    against: tuple[str, ...] = ("standard", "standard-2x")

    def part(self, dataset: str | None, model: str | None) -> tuple[tuple[str, str], dict[str, Published | None]]:
        """Return the part for a dataset and a model; None: the first that fits.

        Raises:
            ApartError: where the table has none.
        """
        for (known_dataset, known_model), rows in self.parts.items():
            if dataset in (None, known_dataset) and model in (None, known_model):
                return (known_dataset, known_model), rows
        known = "; ".join(f"--dataset {dataset} --model {model}" for dataset, model in self.parts)
        raise ApartError(f"{self.title} has no part with --dataset {dataset} --model {model}; it has {known}.")


TABLES: dict[str, Table] = {
    "table1": Table(
        "Table 1",
        {
            ("cifar100", "wide_resnet40_2"): _published(
                _TABLE_1,
                "76.10 76.73 77.47 79.05 79.21 76.63 77.96 79.22 79.00",
                "0.24 0.27 0.09 0.25 0.23 0.34 0.43 0.22 0.09",
            ),
            ("cifar10", "wide_resnet40_2"): _published(
                _TABLE_1,
                "94.67 94.99 95.39 95.69 95.81 95.43 96.03 95.86 95.78",
                "0.10 0.11 0.14 0.13 0.27 0.11 0.11 0.05 0.08",
            ),
            ("cifar100", "preact_resnet18"): _published(
                _TABLE_1,
                "76.30 75.34 78.57 79.48 80.07 77.30 78.81 80.07 80.19",
                "0.11 0.21 0.17 0.15 0.18 0.50 0.45 0.17 0.15",
            ),
            ("cifar10", "preact_resnet18"): _published(
                _TABLE_1,
                "94.60 94.76 95.56 95.84 96.12 95.76 96.19 96.28 96.08",
                "0.17 0.12 0.16 0.16 0.06 0.11 0.12 0.09 0.18",
            ),
        },
    ),
    "table2": Table(
        "Table 2",
        {
            ("tiny-imagenet", "preact_resnet18"): _published(
                (
                    "standard",
                    "standard-mixup",
                    "standard-2x",
                    "standard-mixup-2x",
                    "apart",
                    "apart-mixup",
                    "apart-sam",
                    "apart-sam-mixup",
                ),
                "63.52 64.34 63.94 64.54 67.00 67.26 67.53 68.66",
            ),
            ("imagenet", "resnet18"): _published(
                ("standard", "standard-2x", "standard-4x", "apart", "apart-4x", "apart-sam"),
                "70.24 71.25 71.45 70.86 72.14 70.82",
            ),
        },
    ),
    "table3": Table(
        "Table 3",
        {
            ("cifar100", "wide_resnet40_2"): _published(
                (
                    "standard",
                    "standard-1.2x",
                    "standard-2x",
                    "apart-N24-n1",
                    "apart-N24-n2",
                    "apart-N24-n8",
                    "apart-eps0.05-n8",
                    "apart-eps0.1-n8",
                    "apart-eps0.2-n8",
                    "apart-eps0.4-n8",
                    "apart-n1",
                    "apart-n2",
                    "apart",
                    "apart-n32",
                ),
                "76.10 76.24 76.73 77.58 77.50 77.35 78.45 78.80 77.95 71.86 78.36 78.54 79.05 78.69",
                "0.24 0.30 0.27 0.17 0.17 0.36 0.12 0.23 0.30 0.12 0.22 0.39 0.25 0.19",
            )
        },
    ),
    "study": Table(
        "Study",
        {
            ("cifar100", "wide_resnet40_2"): dict.fromkeys(
                (
                    "standard",
                    "standard-2x",
                    "ghost-bn",
                    "random-bn",
                    "random-bn-n1",
                    "sam",
                    "sam-on",
                    "apart",
                    "apart-n1",
                    "apart-sam",
                    "apart-sam-n1",
                    "apart-every2",
                    "apart-ratio0.25",
                    "apart-last-half",
                    "gsam",
                    "awp",
                    "advprop",
                    "advprop-k1",
                    "fast-advprop",
                    "advbn",
                )
            )
        },
        against=("standard", "standard-2x", "ghost-bn", "random-bn"),
    ),
}


def recipe_name(dataset: str, model: str, row: Row) -> str:
    """Name the recipe that a row starts from."""
    for name, settings in RECIPES.items():
        if (settings["dataset"], settings["model"]) == (dataset, model) and name.endswith("-standard"):
            return name.removesuffix("standard") + row.recipe
    raise ApartError(f"there is no recipe for {model} on {dataset}.")


def chosen_rows(known: dict[str, Any], names: Iterable[str] | None) -> list[str]:
    """Return the named rows, in the table's order; None: all.

    Raises:
        ApartError: for one that the table does not have.
    """
    if names is None:
        return list(known)
    wanted = [name.strip() for name in names]
    for name in wanted:
        if name not in known:
            raise unknown_name("row", name, known)
    return [name for name in known if name in wanted]
