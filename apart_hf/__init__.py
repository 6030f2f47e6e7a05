"""APART: adversarially perturbed batch normalisation for any timm BatchNorm model."""

from apart_hf import models as _models  # noqa: F401  registers our architectures with timm
from apart_hf.errors import ApartError
from apart_hf.hub.pretrained import list_pretrained, load_pretrained
from apart_hf.strategies.methods import create_strategy, list_strategies
from apart_hf.version import __version__

__all__ = ["ApartError", "__version__", "create_strategy", "list_pretrained", "list_strategies", "load_pretrained"]
