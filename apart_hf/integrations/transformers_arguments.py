"""The training arguments of a transformers Trainer that trains by a method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from apart_hf.errors import ApartError
from apart_hf.integrations.extras import brought_by
from apart_hf.strategies.hyper_parameters import MethodName, Uneven
from apart_hf.strategies.methods import check_hyper_parameters, list_strategies

with brought_by("transformers", "transformers"):
    from transformers import TrainingArguments

_PREFIX = "apart_"


def _argument(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ApartTrainingArguments(TrainingArguments):
    """Holds training arguments with a method and its hyper-parameters; `HfArgumentParser` makes flags of them.

    A hyper-parameter that is None has the method's own default.

    Args:
        apart_method: one of `list_strategies()`.
        apart_epsilon, apart_groups, apart_ratio, apart_rho, apart_eta, apart_gamma, apart_alpha: see `create_strategy`.
        apart_pixel_epsilon, apart_pixel_step, apart_layer, apart_step_size, apart_steps: see `create_strategy`.
        apart_random_start, apart_aux_affine, apart_local_attack, apart_global_norm: options, see `create_strategy`.
        apart_every: the second pass is made in each so-manieth step of the optimizer.
        apart_uneven: see `create_strategy`; the default fits groups and ratio to batches of any size.

    Raises:
        ApartError: for an unknown method, and a hyper-parameter that the method has not.

    Example:
        >>> from apart_hf.integrations.transformers import ApartTrainingArguments
        >>> from transformers import HfArgumentParser
        >>> flags = "--output_dir output --apart_method apart-sam --apart_groups 4".split()
        >>> (args,) = HfArgumentParser(ApartTrainingArguments).parse_args_into_dataclasses(flags)
        >>> args.apart_method, args.apart_groups, args.apart_epsilon
        ('apart-sam', 4, None)
    """

    apart_method: MethodName = _argument("apart", f"How gradients are computed: {', '.join(list_strategies())}.")
    apart_epsilon: float | None = _argument(
        None, "Radius of the perturbation of BatchNorm's statistics, as a share of the batch's own mean and scale."
    )
    apart_groups: int | None = _argument(
        None, "Parts of the second batch that BatchNorm normalises apart. Choose it for the batch of one device."
    )
    apart_ratio: float | None = _argument(None, "Share of the batch that the second pass takes, in (0, 1].")
    apart_rho: float | None = _argument(None, "Radius of the perturbation of the weights, for methods with SAM.")
    apart_eta: float | None = _argument(None, "What keeps the scale of small weights from zero, for methods with ASAM.")
    apart_layer: str | None = _argument(None, "Layer whose features advbn perturbs; auto: the end of the first stage.")
    apart_step_size: float | None = _argument(None, "Change of the features' statistics in a step of advbn's ascent.")
    apart_gamma: float | None = _argument(
        None, "Radius of the perturbation of each weight, as a share of its norm, for awp."
    )
    apart_alpha: float | None = _argument(
        None, "Share of the clean gradient's part that is orthogonal to the perturbed one, for gsam."
    )
    apart_pixel_epsilon: float | None = _argument(None, "Largest change of a pixel, in units of 1/255.")
    apart_pixel_step: float | None = _argument(None, "Change of a pixel in a step of the ascent, in units of 1/255.")
    apart_steps: int | None = _argument(None, "Steps of the ascent, in the images or features.")
    apart_random_start: bool = _argument(False, "Begin the ascent in the images at random, which takes one more pass.")
    apart_aux_affine: bool = _argument(False, "Train a gamma and beta of perturbed batches' own in BatchNorm.")
    apart_local_attack: bool = _argument(False, "Each process attacks the statistics by the gradient of its own batch.")
    apart_global_norm: bool = _argument(False, "All processes climb the mean of their weights' gradients.")
    apart_every: int = _argument(1, "The second pass is made in each so-manieth step of the optimizer.")
    apart_uneven: Uneven = _argument(
        "fit",
        "What becomes of batches that groups or ratio do not fit, such as the last one of an epoch: fit (the largest "
        "number of groups that fits), plain (an ordinary pass) or error.",
    )

    def __post_init__(self) -> None:
        """Check the method's name and which hyper-parameters are given."""
        hyper = {*method_options(self)} - {"method", "every", "uneven"}
        check_hyper_parameters(self.apart_method, sorted(hyper))
        super().__post_init__()


def method_options(args: Any) -> dict[str, Any]:
    """Read from training arguments what `create_loss` takes: "method", "every", "uneven" and the hyper-parameters.

    Raises:
        ApartError: where they lack a field of `ApartTrainingArguments`.
    """
    names = [name for name in ApartTrainingArguments.__dataclass_fields__ if name.startswith(_PREFIX)]
    missing = [name for name in names if not hasattr(args, name)]
    if missing:
        raise ApartError(
            f"the training arguments ({type(args).__name__}) have no {missing[0]}; use ApartTrainingArguments, or a "
            "dataclass that inherits from it."
        )
    given = {name.removeprefix(_PREFIX): getattr(args, name) for name in names}
    return {key: value for key, value in given.items() if value is not None and value is not False}
