"""The epochs of a run so far, and the best of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from apart_hf.training.epoch_metrics import EpochMetrics, Evaluation


@dataclass
class History:
    """Holds the metrics of each epoch, in order.

    Args:
        metric: that the best epoch is chosen by: top1, top5 or eval_loss.
        epochs: so far.
    """

    metric: str
    epochs: list[EpochMetrics] = field(default_factory=list)

    @property
    def latest(self) -> EpochMetrics:
        """Return those of the last epoch."""
        return self.epochs[-1]

    @property
    def latest_evaluation(self) -> Evaluation:
        """Return that of the last epoch which was evaluated, as the last epoch of a run always is."""
        return next(metrics.evaluation for metrics in reversed(self.epochs) if metrics.evaluation is not None)

    def best(self) -> EpochMetrics | None:
        """Return those of the best epoch that was evaluated, the later of equals; None: none was."""
        sign = -1 if self.metric == "eval_loss" else 1

        def rank(metrics: EpochMetrics) -> float:
            value = float(getattr(metrics.evaluation, self.metric))
            return -math.inf if math.isnan(value) else sign * value

        evaluated = [metrics for metrics in reversed(self.epochs) if metrics.evaluation is not None]
        return max(evaluated, key=rank, default=None)
