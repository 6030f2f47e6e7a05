"""Numbers of NumPy and torch, which schedules compute, as those of Python: messages and states have no others."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import numpy as np
from torch import Tensor


def python_number(value: Any) -> Any:
    """Return a number as Python's int, float or bool.

    Args:
        value: a number of Python, NumPy or torch; or an array or tensor of no dimension that holds one.

    Returns:
        The number; what is none comes back as it is, for checks to refuse.
    """
    if isinstance(value, (Tensor, np.ndarray)) and not value.ndim:
        value = value.item()
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    return float(value) if isinstance(value, numbers.Real) else value


def python_numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Return a dict whose numbers are Python's, see `python_number`."""
    return {key: python_number(value) for key, value in values.items()}
