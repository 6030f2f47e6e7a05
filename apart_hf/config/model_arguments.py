"""--model-kwargs, and how many channels of the images they or --in-chans ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apart_hf.config.key_values import check_key_values, key_values
from apart_hf.data.settings import CHANNELS
from apart_hf.errors import ApartError

if TYPE_CHECKING:
    from apart_hf.config.train_config import TrainConfig

_POOLS = "avg, max, avgmax and catavgmax"


def check_model_arguments(config: TrainConfig) -> None:
    """Raise ApartError for arguments of the model that cannot be trained with, or contradict other settings."""
    check_key_values("--model-kwargs", config.model_kwargs, "drop_block_rate=0.1")
    arguments = key_values(config.model_kwargs)
    if "global_pool" in arguments and not arguments["global_pool"]:
        raise ApartError(
            "--model-kwargs global_pool= turns the pooling before the classifier off, which then gives no class for an "
            f"image; leave it out, or name a pooling (of most models {_POOLS})."
        )
    asked = _asked_channels(config)
    for where, channels in asked.items():
        if not isinstance(channels, int) or isinstance(channels, bool) or channels not in CHANNELS:
            raise ApartError(f"{where}: images are read with 1 channel (grey) or 3 (RGB) only; take 1 or 3.")
    if len(set(asked.values())) > 1:
        raise ApartError(f"{' and '.join(asked)} are different numbers of channels; leave one of them out.")


def channels_of(config: TrainConfig) -> int | None:
    """Return how many channels the settings ask for; None: as many as the model has."""
    asked = set(_asked_channels(config).values())
    return next(iter(asked), None)


def _asked_channels(config: TrainConfig) -> dict[str, Any]:
    """Return the numbers that are asked for, by what asks for them."""
    found: dict[str, Any] = {}
    if config.in_chans is not None:
        found[f"--in-chans {config.in_chans}"] = config.in_chans
    arguments = key_values(config.model_kwargs)
    if "in_chans" in arguments:
        found[f"--model-kwargs in_chans={arguments['in_chans']}"] = arguments["in_chans"]
    return found
