"""The bar of an epoch and of an evaluation: what it counts to, and what it says."""

import io
import logging
import re
import sys

import pytest
import torch

from apart_hf.runs.train import train
from apart_hf.training.progress import Progress
from tests.support.settings import settings


def totals(said, title):
    return {int(total) for total in re.findall(rf"{title}: *\d+%\|[^|]*\| \d+/(\d+) ", said)}


@pytest.mark.parametrize(
    "steps, batch, max_steps, accumulated, made",
    [
        (0, 0, None, 1, 9),
        (0, 0, 4, 1, 4),
        (0, 0, 100, 1, 9),
        (9, 0, 12, 1, 3),  # in the second epoch
        (10, 1, 12, 1, 3),  # resumed within it
        (0, 0, 2, 4, 8),
        (0, 0, 3, 4, 9),  # the third step has one batch
        (3, 0, 3, 4, 0),
        (2, 8, 3, 4, 9),
    ],
)
def test_what_the_bar_counts_to(steps, batch, max_steps, accumulated, made):
    progress = Progress("cpu")
    progress.steps, progress.batch = steps, batch
    assert progress.batches_until(max_steps, 9, accumulated) == made


def test_the_bars_of_a_run(little, tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("apart_hf.training.progress.SECONDS", 0.0)  # shown after each step
    train(settings(little, tmp_path, epochs=2, max_steps=15, sched="cosine", lr=0.05, checkpoint_every=None))
    said = terminal.getvalue()
    assert totals(said, "epoch 1/2") == {9} and totals(said, "epoch 2/2") == {6}
    assert totals(said, "evaluation") == {4}  # batches of 8 of 30 images
    shown = [float(lr) for lr in re.findall(r"lr ([\d.e-]+), \d+ images/s", said)]
    cosine = [0.025 * (1 + torch.cos(torch.tensor(torch.pi * step / 18)).item()) for step in (0, 9 + 5)]
    assert [shown[0], shown[-1]] == pytest.approx(cosine, rel=5e-3)


def test_without_a_terminal_there_are_lines_and_no_bar(little, tmp_path, caplog, capsys):
    with caplog.at_level(logging.INFO, logger="apart_hf"):
        train(settings(little, tmp_path, epochs=1, max_steps=4, log_interval=2, checkpoint_every=None))
    lines = [line for line in caplog.messages if line.startswith("epoch 1/1, step ")]
    assert [line.split(":")[0] for line in lines] == ["epoch 1/1, step 2/4", "epoch 1/1, step 4/4"]
    assert all(", lr 0.02, " in line for line in lines)
    assert "%|" not in capsys.readouterr().err
