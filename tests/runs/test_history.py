"""The epochs of a run: which is the best, and that their lines are read again as they were written."""

import json
import math

import pytest

from apart_hf.runs.history import History
from apart_hf.training.epoch_metrics import EpochMetrics, Evaluation, TrainedEpoch


def epoch(number, top1=None, top5=0.0, eval_loss=0.0, **more):
    evaluation = None if top1 is None else Evaluation(eval_loss, top1, top5, more.pop("eval_skipped", None))
    return EpochMetrics(number, TrainedEpoch(1.5, 10.0, 99.5, 2.25), evaluation, 0.1, **more)


@pytest.mark.parametrize("metric, best", [("top1", 3), ("top5", 1), ("eval_loss", 3)])
def test_best_is_chosen_by_the_metric(metric, best):
    """The later of equals is taken; an epoch that was not evaluated is none."""
    figures = enumerate([(1, 5, 0.3), (3, 5, 0.2), (2, 4, 0.1), (3, 1, 0.1)])
    history = History(metric, [*(epoch(i, *values) for i, values in figures), epoch(4)])
    assert history.best().epoch == best and history.latest.epoch == 4


def test_no_epoch_is_the_best_of_none():
    assert History("top1", [epoch(1)]).best() is None
    assert History("eval_loss", [epoch(1, 5.0, eval_loss=math.nan), epoch(2, 1.0, eval_loss=9.0)]).best().epoch == 2


@pytest.mark.parametrize(
    "metrics, keys",
    [
        (epoch(1), "epoch train_loss train_top1 images_per_second seconds lr"),
        (epoch(2, 50.0, 90.0, 0.5), "epoch train_loss train_top1 images_per_second seconds eval_loss top1 top5 lr"),
        (
            epoch(3, 50.0, 90.0, 0.5, eval_skipped=0, train_skipped=2, skipped_steps=1),
            "epoch train_loss train_top1 images_per_second seconds eval_loss top1 top5 eval_skipped lr train_skipped "
            "skipped_steps",
        ),
    ],
)
def test_a_line_is_read_again(metrics, keys):
    line = json.loads(json.dumps(metrics.as_line()))
    assert list(line) == keys.split() and EpochMetrics.from_line(line) == metrics
