"""APART: adversarially perturbed batch normalisation for any timm BatchNorm model."""

from apart_hf import models as _models  # noqa: F401  registers our architectures with timm
from apart_hf.errors import ApartError
from apart_hf.pretrained import list_pretrained, load_pretrained
from apart_hf.strategies import create_strategy, list_strategies

__version__ = "0.1.0"
__all__ = ["ApartError", "create_strategy", "list_pretrained", "list_strategies", "load_pretrained"]
