"""Runs that go on with other settings, or from the midst of their last evaluation."""

import shutil

import pytest

from apart_hf import ApartError
from apart_hf.runs.checkpoint_state import CheckpointState
from apart_hf.runs.resume import place
from apart_hf.runs.train import train
from apart_hf.training.state import TrainerState
from apart_hf.training.trainer import Trainer
from tests.support.processes import assert_equal_runs, latest, result
from tests.support.settings import settings


@pytest.mark.parametrize("last", [{"max_steps": 5}, {"epochs": 1}])
def test_cut_off_in_the_last_evaluation(last, little, tmp_path, monkeypatch):
    def cut(*_):
        raise RuntimeError("cut off")

    whole = train(settings(little, tmp_path / "whole", checkpoint_every="1", **last))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", cut)
        with pytest.raises(RuntimeError, match="cut off"):
            train(settings(little, tmp_path, checkpoint_every="1", **last))
    again = train(settings(little, tmp_path, checkpoint_every="1", **last, resume="auto"))
    assert_equal_runs(whole, again)


@pytest.mark.parametrize("sched, want", [("none", [0.02, 0.002]), ("multistep", [0.02, 0.0002])])
def test_another_learning_rate_and_decay_count(sched, want, little, tmp_path):
    one = train(settings(little, tmp_path, sched=sched, epochs=2, max_steps=9))  # an epoch
    assert latest(one).name == "step-00000009"
    train(settings(little, tmp_path, sched=sched, epochs=2, lr=0.002, weight_decay=0.3, resume="auto", override=True))
    assert [line["lr"] for line in result(one)[0]] == pytest.approx(want)
    plain = train(settings(little, tmp_path / "plain", sched=sched, epochs=2, max_steps=9))
    train(settings(little, plain.parent, sched=sched, epochs=2, lr=0.002, resume="auto", override=True))
    states = [result(folder)[1]["last"] for folder in (one, plain)]
    weights = [sum(float(value.square().sum()) for value in state.values() if value.dim() == 4) for state in states]
    assert weights[0] < weights[1]  # by the decay


def test_smaller_batches_go_on_from_the_same_image(little, tmp_path, monkeypatch, trained_here):
    """What is tried where memory runs out: half the batch, twice the accumulation."""
    one = trained_here
    for folder in (one / "checkpoints").glob("step-*"):
        if folder.name > "step-00000004":
            shutil.rmtree(folder)
    seen, train_step = [], Trainer.train_step

    def noted(trainer, images, *rest):
        seen.append(len(images))
        return train_step(trainer, images, *rest)

    monkeypatch.setattr(Trainer, "train_step", noted)
    again = {"resume": "auto", "override": True}
    with pytest.raises(ApartError, match="is of 8 images a step on each process, now there are 4, and the schedule"):
        train(settings(little, tmp_path, batch_size=4, **again))
    with pytest.raises(ApartError, match="is 3 batches of 8 images in an epoch, where no batch of 16 ends"):
        place(CheckpointState(TrainerState(6, 0, 3, None, None, {}), [], None, (8, 16), {}, "", 1), (16, 16))
    train(settings(little, tmp_path, batch_size=4, grad_accum_steps=2, **again))
    assert seen == [4] * (2 * (9 - 4) + 2 * 9) and latest(one).name == "step-00000018"
