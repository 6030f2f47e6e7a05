"""Every setting of a run: one dataclass, from which the command line and the configuration file are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from apart_hf.config.augmentation_group import AugmentationGroup
from apart_hf.config.checks import check_values
from apart_hf.config.data_group import DataGroup
from apart_hf.config.durations import seconds_of
from apart_hf.config.model_groups import MethodGroup, ModelGroup
from apart_hf.config.optimisation_group import OptimisationGroup
from apart_hf.config.run_groups import CommandGroup, PublishingGroup, RunGroup
from apart_hf.config.schedule import run_epochs
from apart_hf.config.schedule_group import ScheduleGroup, ScheduleName
from apart_hf.config.setting import settings_of
from apart_hf.errors import ApartError
from apart_hf.strategies.methods import METHODS

HYPER_PARAMETERS = sorted({key for method in METHODS.values() for key in method.hyper_parameters()})


@dataclass(frozen=True)
class TrainConfig(  # fields of the last base come first
    RunGroup,
    PublishingGroup,
    ScheduleGroup,
    OptimisationGroup,
    AugmentationGroup,
    DataGroup,
    MethodGroup,
    ModelGroup,
    CommandGroup,
):
    """Holds the settings of one training run. None stands for "decided from the others", as the help texts say.

    It is never changed: `config.defaults` makes a complete one in two steps.

    Args:
        **settings: the flags of `apart-hf train --help`, with _ for -, all of them optional.

    Raises:
        ApartError: where a value is out of range, or two settings do not fit each other.

    Example:
        >>> from apart_hf import ApartError, TrainConfig
        >>> config = TrainConfig(model="preact_resnet18", dataset="cifar10", method="apart", epsilon=0.1)
        >>> config.dataset_name, config.hyper_parameters()
        ('cifar10', {'epsilon': 0.1})
        >>> try:
        ...     TrainConfig(epochs=0)
        ... except ApartError as error:
        ...     print(error)
        --epochs 0: must be a finite number of at least 1.
    """

    def __post_init__(self) -> None:
        check_values(self)

    @property
    def checkpoint_interval(self) -> tuple[int | None, float | None]:
        """Return (steps, seconds) between checkpoints within an epoch; both None: none there.

        Raises:
            ApartError: where `checkpoint_every` is neither.
        """
        text = self.checkpoint_every
        if text is None:
            return None, None
        number = text.removesuffix("m")
        if not number.isascii() or not number.isdigit() or len(number) > 9 or int(number) < 1:
            raise ApartError(f"--checkpoint-every {text!r}: a number of steps, such as 500, or of minutes: 10m.")
        return (int(number), None) if number == text else (None, 60.0 * int(number))

    @property
    def time_limit_seconds(self) -> float | None:
        """Return the seconds from the start of the process to its end; None: there is no limit.

        Raises:
            ApartError: where `time_limit` is no time.
        """
        return None if self.time_limit is None else seconds_of("--time-limit", self.time_limit)

    @property
    def dataset_name(self) -> str:
        """Name the dataset for folders and records: by its name, or that of its folder without the way to it."""
        return Path(self.data_dir).resolve().name if self.data_dir else self.dataset

    def hyper_parameters(self) -> dict[str, Any]:
        """Return those hyper-parameters of the method that were given."""
        values = {key: getattr(self, key) for key in HYPER_PARAMETERS}
        return {key: value for key, value in values.items() if value is not None and value is not False}

    @property
    def trackers(self) -> list[str] | None:
        """Return the trackers that `report_to` and `log_wandb` name."""
        found = self.report_to or []
        return [*found, "wandb"] if self.log_wandb and "wandb" not in found else self.report_to


class FilledConfig(TrainConfig):
    """Holds a config after `fill_defaults`: what depends on other settings alone is decided."""

    epochs: int
    batch_size: int
    weight_decay: float
    sched: ScheduleName
    decay_milestones: list[int]
    workers: int

    @property
    def run_epochs(self) -> int:
        """Return how many epochs the run has, with those that the schedule adds."""
        return run_epochs(self)


class CompleteConfig(FilledConfig):
    """Holds a config after `fill_from_data`: what depends on data, model or machine is decided, too."""

    lr: float
    amp_dtype: Literal["float32", "bfloat16", "float16"]
    threads: int
    train_split: str
    val_split: str
    input_key: str
    target_key: str
    num_classes: int
    img_size: int
    experiment: str


SETTINGS = settings_of(TrainConfig)
