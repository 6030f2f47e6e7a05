"""How many passes over the batch a run makes in a step, on average, and how many epochs a budget of passes gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from apart_hf.errors import ApartError
from apart_hf.strategies.methods import METHODS

if TYPE_CHECKING:
    from apart_hf.config.train_config import FilledConfig, TrainConfig


def plain_epochs_of(config: TrainConfig) -> int:
    """Return how many epochs, from the first on, are without second passes."""
    return config.perturb_from_epoch - 1


def passes_of(method: str, settings: Mapping[str, Any]) -> float:
    """Return the passes over the batch of a step that is not plain, on average over `every`.

    Args:
        method: its name.
        settings: by name; where they leave a hyper-parameter open, the method's own counts.
    """
    known = [key for key in METHODS[method].hyper_parameters() if settings.get(key) is not None]
    return METHODS[method].passes(every=settings["every"], **{key: settings[key] for key in known})


def mean_passes(config: FilledConfig, steps_per_epoch: int | None = None) -> float:
    """Return the passes over the batch of a step, on average over the run.

    Args:
        config: its defaults are filled in.
        steps_per_epoch: optimizer steps, so that an end by `max_steps` counts; None: all epochs are made.
    """
    perturbed = passes_of(config.method, vars(config))
    length = steps_per_epoch or 1
    steps = config.run_epochs * length
    if steps_per_epoch is not None and config.max_steps is not None:
        steps = min(steps, config.max_steps)
    plain = min(steps, plain_epochs_of(config) * length)
    return perturbed - (perturbed - 1) * plain / steps


def budgeted(
    epochs: int, milestones: list[int] | None, budget: float, passes: float, plain: int = 0
) -> tuple[int, list[int] | None]:
    """Compute epochs and milestones for a budget in units of the given epochs of plain training (Section 4.1).

    A method whose step costs so many `passes` over the batch gets budget / passes times the epochs: 200 epochs of
    APART with N = M are budget 2.

    Args:
        epochs, milestones: that are given.
        budget: in units of `epochs` passes over the data.
        passes: over the batch, of a step that is not plain.
        plain: epochs of plain steps, with which the training begins.

    Raises:
        ApartError: where less than an epoch is left.
    """
    passes_in_all = epochs * budget
    perturbed = max(0.0, passes_in_all - plain) / passes
    wanted = min(passes_in_all, plain) + perturbed
    if not 0.5 <= wanted < 1e9:
        raise ApartError(
            f"--budget {budget:g}: {wanted:g} epochs ({epochs} x {budget:g} / {passes:g} passes); take one "
            f"between {passes / epochs:g} and {1e6 * passes / epochs:g}."
        )
    scaled, factor = round(wanted) or 1, wanted / epochs
    return scaled, milestones and [max(1, round(m * factor)) for m in milestones]
