"""Whole runs that meet a loss or a gradient that is not finite."""

import pytest
import torch

from apart_hf import ApartError
from apart_hf.cli.train import main
from apart_hf.data.dataset_memory import InMemoryImages
from apart_hf.runs.train import train
from tests.support.processes import assert_equal_runs, result
from tests.support.settings import settings


@pytest.fixture
def one_bad_image(monkeypatch):
    """One of the training images comes out infinite, in every epoch."""
    make = InMemoryImages.__getitems__

    def harmed(self, indices):
        images, labels = make(self, indices)
        if self.flip and 40 in indices:
            images[0] = torch.inf
        return images, labels

    monkeypatch.setattr(InMemoryImages, "__getitems__", harmed)


def test_a_run_that_stopped_goes_on_by_skipping_and_is_one_that_skipped(
    little, one_bad_image, tmp_path, spoken, capsys
):
    more = {"method": "apart-sam", "groups": 2, "checkpoint_every": "1"}
    whole = train(settings(little, tmp_path / "whole", **more, on_nonfinite="skip"))
    assert [line["skipped_steps"] for line in result(whole)[0]] == [1, 1]
    assert "epoch 2: 1 step(s) left out for a loss or gradient that is not finite" in capsys.readouterr().out
    with pytest.raises(ApartError, match=r"step \d+: loss nan, learning rate 0.02; the first .* the images") as raised:
        train(settings(little, tmp_path, **more))
    step = int(str(raised.value).split()[1].rstrip(":"))
    kept = [path.name for path in sorted((tmp_path / "run/checkpoints").glob("step-*"))]
    assert kept == [f"step-{k:08}" for k in range(1, step)] and len(kept) > 0
    assert f"The last good checkpoint is {tmp_path}/run/checkpoints/{kept[-1]}" in str(raised.value)
    assert "--on-nonfinite skip" in str(raised.value) and "--resume auto" in str(raised.value)
    assert_equal_runs(whole, train(settings(little, tmp_path, **more, on_nonfinite="skip", resume="auto")))


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--lr 1e300", "--lr 1e+300: training computes in float32, which has numbers from 1.2e-38 to 3.4e38"),
        ("--clip-grad 1e-300", "--clip-grad 1e-300: training computes in float32"),
        ("--std 1e-300 1 1", "--std 1e-300: training computes in float32"),
        ("--lr 1e38", "step 2: loss nan, learning rate 1e+38; the first non-finite values are in the output of layer"),
        ("--lr 1e38 --max-steps 1", "after step 1, at learning rate 1e+38, the evaluation's loss is nan"),
        ("--momentum 1e38", "step 3: loss nan"),
        ("--weight-decay 1e38", "step 2: loss nan"),
        ("--method sam --rho 1e38", "lower --lr or --rho"),
        (
            "--opt adamw --lr 3e38",
            "step 1: the optimizer computes with a number beyond float32, at learning rate 3e+38",
        ),
    ],
)
def test_numbers_beyond_reason_end_in_one_line(flags, said, little, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        own = "--model test_resnet --method standard -b 8 --epochs 1 --threads 1"
        main([*own.split(), "--data-dir", little, "--output", str(tmp_path), *flags.split()])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and said in error
    assert not list(tmp_path.iterdir())  # there was nothing to keep
