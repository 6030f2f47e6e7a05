"""The CPU's kernels with statistics by rows in the clean pass, too, whose running statistics are then its own.

They differ from a plain step's by rounding, which is why the set is one to ask for.
"""

from __future__ import annotations

from torch import Tensor

from apart_hf.batchnorm import cpu_kernels
from apart_hf.batchnorm.affine import Affine
from apart_hf.batchnorm.cpu_kernels import backward
from apart_hf.batchnorm.normalised import Normalisation, Normalised, is_real, is_single_dtype
from apart_hf.batchnorm.row_statistics import has_long_rows

__all__ = ["backward", "forward"]


def forward(x: Tensor, affine: Affine, how: Normalisation) -> Normalised:
    """Compute as `kernels.forward` does."""
    if how.grouping.groups == 1 and is_real(x) and is_single_dtype(x) and has_long_rows(x):
        return cpu_kernels.statistics_first(x, affine, how)
    return cpu_kernels.forward(x, affine, how)
