"""Numbers of NumPy and torch, which schedules compute, as those of Python, and hyper-parameters that are checked."""

from __future__ import annotations

import numbers
import operator
import sys
from typing import Any

import numpy as np
from torch import Tensor

from apart_hf.errors import ApartError, written


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


def is_finite(value: Any) -> bool:
    """Tell whether a value is a number of Python's that is finite as a float; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def checked_radius(name: str, value: Any, usual: str, *, what: str = "radius") -> float:
    """Return `value`, or raise ApartError where it is no radius, or other size, which is a finite number >= 0."""
    value = python_number(value)
    if not (is_finite(value) and value >= 0):
        raise ApartError(f"{name}={written(value)}: the {what} must be a finite number >= 0 ({usual}).")
    return value


def checked_count(name: str, value: Any, what: str) -> int:
    """Return `value`, or raise ApartError where it is no number of `what`, which is an integer >= 1."""
    value = python_number(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ApartError(f"{name}={written(value)}: the number of {what} must be an integer >= 1.")
    return value


def checked_option(name: str, value: Any) -> bool:
    """Return `value`, or raise ApartError where it is neither True nor False."""
    value = python_number(value)
    if not isinstance(value, bool):
        raise ApartError(f"{name}={written(value)}: the option is True or False.")
    return value
