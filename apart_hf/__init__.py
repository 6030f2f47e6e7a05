"""APART: adversarially perturbed batch normalisation for any timm BatchNorm model."""

from typing import TYPE_CHECKING

from apart_hf import models as _models  # noqa: F401  registers our architectures with timm
from apart_hf.errors import ApartError
from apart_hf.hub.pretrained import list_pretrained, load_pretrained
from apart_hf.strategies.create import create_strategy
from apart_hf.strategies.hyper_parameters import MethodName
from apart_hf.strategies.loss import create_loss
from apart_hf.strategies.methods import METHODS, Method, list_strategies
from apart_hf.strategies.perturbation import Perturbation
from apart_hf.strategies.two_pass import TwoPassStrategy
from apart_hf.strategies.two_pass_loss import TwoPassLoss
from apart_hf.utils.lazy import lazy_exports
from apart_hf.version import __version__

if TYPE_CHECKING:
    from apart_hf.config.train_config import TrainConfig
    from apart_hf.hub.publish import push_to_hub
    from apart_hf.runs.train import train
else:  # they bring accelerate, datasets and matplotlib, which a training loop of one's own need not wait for
    __getattr__ = lazy_exports(
        __name__, {"TrainConfig": "config.train_config", "push_to_hub": "hub.publish", "train": "runs.train"}
    )

__all__ = [
    "METHODS",
    "ApartError",
    "Method",
    "MethodName",
    "Perturbation",
    "TrainConfig",
    "TwoPassLoss",
    "TwoPassStrategy",
    "__version__",
    "create_loss",
    "create_strategy",
    "list_pretrained",
    "list_strategies",
    "load_pretrained",
    "push_to_hub",
    "train",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
