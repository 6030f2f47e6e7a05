"""Top-1 and top-5 accuracy as an `evaluate.Metric` that needs no Hub."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike

K = 5


class TopKAccuracy(evaluate.Metric):
    """Counts the samples, in per cent, whose class is the first (top1) or among the first five (top5) predictions.

    `predictions` are class indices, best first, (samples, min(5, classes)); `references` are class indices. Indices
    rather than logits: what evaluate stores stays small.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: best classes first; references",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        return {"top1": float(100.0 * hits[:, 0].mean()), "top5": float(100.0 * hits[:, :K].any(1).mean())}
