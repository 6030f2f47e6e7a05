"""Top-1 and top-5 accuracy: an `evaluate.Metric` that needs no Hub, or the same without the package evaluate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

K = 5


def top_k_accuracy(predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """Count the samples, in per cent, whose class is the first (top1) or among the first five (top5) predictions.

    Args:
        predictions: (samples, min(5, classes)) class indices, best first.
        references: (samples,) class indices.
    """
    hits = np.asarray(predictions) == np.asarray(references)[:, None]
    return {"top1": float(100.0 * hits[:, 0].mean()), "top5": float(100.0 * hits[:, :K].any(1).mean())}


class PlainTopKAccuracy:
    """Collects batches in memory and computes `top_k_accuracy` of them, by the calls of an `evaluate.Metric`."""

    def __init__(self, **settings: Any) -> None:
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []

    def add_batch(self, *, predictions: ArrayLike, references: ArrayLike) -> None:
        """Add samples."""
        self._batches.append((np.asarray(predictions), np.asarray(references)))

    def compute(self) -> dict[str, float]:
        """Compute the accuracies of all samples since the last call."""
        batches, self._batches = self._batches, []
        return top_k_accuracy(*map(np.concatenate, zip(*batches)))


def TopKAccuracy(**settings: Any) -> Any:
    """Make the metric: evaluate's where the package is installed, else the same numbers by a `PlainTopKAccuracy`.

    Indices are added rather than logits: what evaluate stores stays small.

    Args:
        **settings: of `evaluate.Metric`, such as `keep_in_memory`.
    """
    return _metric_class()(**settings)


@functools.cache
def _metric_class() -> Callable[..., Any]:
    try:
        import datasets
        import evaluate
    except ImportError:
        return PlainTopKAccuracy

    class Metric(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=top_k_accuracy.__doc__,
                citation="",
                inputs_description="predictions: best classes first; references",
                features=datasets.Features(
                    {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
                ),
            )

        def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
            return top_k_accuracy(predictions, references)

    return Metric
