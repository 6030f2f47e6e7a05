"""What config.json records of a training, in its block "apart"."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class DataRecord:
    """Says what a model was trained on.

    Args:
        name: of the registered dataset; None: it is none.
        hub_id: where the Hub has the images.
        config: the Hub dataset's configuration.
        split: that was trained on.
        images: how many.
        whole: results are of that dataset's own split, not of a part of it.
        timm_reader: in what timm's own reader of image folders sees other classes; None: it sees the same.
    """

    name: str | None = None
    hub_id: str | None = None
    config: str | None = None
    split: str | None = None
    images: int | None = None
    whole: bool = False
    timm_reader: str | None = None


@dataclass(frozen=True)
class Claim:
    """Says what is claimed of weights.

    Args:
        split: that they were evaluated on.
        epoch: after which they were.
        top1, top5: accuracy in per cent.
        eval_loss: mean cross-entropy.
        images: evaluated; None: of a stream, whose length is not known.
        skipped: images that could not be decoded.
    """

    split: str
    epoch: int
    top1: float
    top5: float
    eval_loss: float
    images: int | None = None
    skipped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the values that are there, by name."""
        lacking = {"images"} if self.images is None else set()
        lacking |= set() if self.skipped else {"skipped"}
        return {key: value for key, value in asdict(self).items() if key not in lacking}


@dataclass(frozen=True)
class TrainingRecord:
    """Says how a model was trained. A model that was not trained here has the default of every value.

    Args:
        method: its name.
        hyper: the method's hyper-parameters.
        passes: over the batch, in a step on average.
        dataset: its name, or that of its folder.
        data: which images; None: it is not known.
        settings: those of `TrainConfig` that say how it was trained.
        recipe: the paper's setting that it started from.
        seed: of all that is drawn.
        base_model: the Hub's name of the weights that training started from.
        versions: of the libraries.
        commit: of this package's checkout.
        results: what is claimed; None: nothing yet.
        sha256: checksum of the weights.
        compared_with: method, passes, epochs and top1 of another run.
    """

    method: str | None = None
    hyper: dict[str, Any] = field(default_factory=dict)
    passes: float | None = None
    dataset: str | None = None
    data: DataRecord | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    seed: int | None = None
    base_model: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    results: Claim | None = None
    sha256: str | None = None
    compared_with: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, block: dict[str, Any]) -> TrainingRecord:
        """Read the block of a config.json; keys that are no field's are hyper-parameters.

        Raises:
            TypeError: where a value is not of its form.
        """
        names = {one.name for one in fields(cls)} - {"hyper"}
        known = {key: value for key, value in block.items() if key in names and value is not None}
        if "data" in known:
            known["data"] = _of(DataRecord, known["data"])
        if "results" in known:
            known["results"] = _of(Claim, known["results"])
        return cls(**known, hyper={key: value for key, value in block.items() if key not in names})

    def to_dict(self) -> dict[str, Any]:
        """Return the block that `from_dict` reads; results, checksum and comparison only where they are there."""
        block = {"method": self.method, **self.hyper, "passes": self.passes, "dataset": self.dataset}
        block["data"] = None if self.data is None else _there(asdict(self.data), {"timm_reader"})
        block |= {key: getattr(self, key) for key in ("settings", "recipe", "seed", "base_model", "versions", "commit")}
        if self.results is not None:
            block["results"] = self.results.to_dict()
        later = {key: getattr(self, key) for key in ("sha256", "compared_with")}
        return block | {key: value for key, value in later.items() if value is not None}


def _there(values: dict[str, Any], optional: set[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None or key not in optional}


def _of(kind: type, values: Any) -> Any:
    if not isinstance(values, dict):
        raise TypeError(f"{values!r} is no table")
    names = {one.name for one in fields(kind)}
    return kind(**{key: value for key, value in values.items() if key in names})
