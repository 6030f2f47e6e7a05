"""What a strategy moves before its second pass: BN statistics (APART) or weights (SAM)."""

from apart_hf.perturbations.base import Perturbation
from apart_hf.perturbations.batchnorm import AdversarialStatistics, GroupStatistics, RandomStatistics
from apart_hf.perturbations.weights import AdaptiveWeights, NormalisationWeights, Weights

__all__ = [
    "AdaptiveWeights", "AdversarialStatistics", "GroupStatistics", "NormalisationWeights", "Perturbation",
    "RandomStatistics", "Weights",
]
