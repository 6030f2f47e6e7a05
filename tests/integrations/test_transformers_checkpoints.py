"""Checkpoints of transformers' Trainer: a run that goes on is the same, and what is said where values differ."""

import pytest
from transformers import Trainer

from apart_hf import ApartError
from apart_hf.integrations.transformers import ApartTrainer
from tests.support.helpers import assert_same
from tests.support.loops import batches
from tests.support.transformers_trainer import Keywords, made, trained


@pytest.mark.parametrize("restores_callbacks", [False, True])
@pytest.mark.parametrize("method, kept", [("apart", 3), ("random-bn", 6)])
def test_the_trainer_s_checkpoints_keep_the_state(method, kept, restores_callbacks, arguments, tmp_path):
    """Cut off within an epoch of 6 steps and at its end, within `every`, with ratio below 1 and shuffled data."""
    parts = batches(*[8] * 6)
    more = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": kept, "train_sampling_strategy": "random"}
    args = arguments(method, 0.5, apart_every=2, restore_callback_states_from_checkpoint=restores_callbacks, **more)
    whole, again = Keywords(), Keywords()
    trained(ApartTrainer, whole, args, parts)
    trainer = made(ApartTrainer, again, args, parts)
    trainer.train(resume_from_checkpoint=str(tmp_path / "output" / f"checkpoint-{kept}"))
    assert_same(again.state_dict(), whole.state_dict(), tolerance=0)
    trainer.train(resume_from_checkpoint=str(tmp_path / "output" / f"checkpoint-{kept}"))  # by the same trainer
    assert_same(again.state_dict(), whole.state_dict(), tolerance=0)


def test_checkpoints_of_the_trainer_as_it_is(arguments, tmp_path):
    """One of a plain trainer is gone on from by ours, and ours by a plain one; another method's is refused."""
    parts, saves = batches(8, 8, 8, 8), {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    checkpoint = str(tmp_path / "output" / "checkpoint-{}")
    trained(Trainer, Keywords(), arguments(**saves), parts)
    trainer = made(ApartTrainer, Keywords(), arguments("sam", **saves | {"max_steps": 3}), parts)
    assert trainer.train(resume_from_checkpoint=checkpoint.format(2)).global_step == 3
    plain = made(Trainer, Keywords(), arguments(**saves | {"max_steps": 4}), parts)
    assert plain.train(resume_from_checkpoint=checkpoint.format(3)).global_step == 4
    other = made(ApartTrainer, Keywords(), arguments("apart", **saves | {"max_steps": 4}), parts)
    with pytest.raises(ApartError, match="load the state of a strategy of the same method"):
        other.train(resume_from_checkpoint=checkpoint.format(3))


def test_resuming_with_other_values_is_said_once(arguments, tmp_path, caplog):
    """In one line; what the run itself had set goes on without one."""

    class Scheduled(ApartTrainer):
        def training_step(self, *args, **kwargs):
            self.strategy.set(epsilon=0.05)
            return super().training_step(*args, **kwargs)

    parts, saves = batches(8, 8, 8), {"save_strategy": "steps", "save_steps": 1}
    checkpoint = str(tmp_path / "output" / "checkpoint-2")
    trained(Scheduled, Keywords(), arguments("apart", apart_epsilon=0.1, max_steps=2, **saves), parts)
    for epsilon, count in ((0.1, 0), (0.4, 1)):
        caplog.clear()
        trainer = made(ApartTrainer, Keywords(), arguments("apart", apart_epsilon=epsilon, max_steps=3), parts)
        trainer.train(resume_from_checkpoint=checkpoint)
        said = [record.getMessage() for record in caplog.records if "goes on with" in record.getMessage()]
        assert len(said) == count and trainer.strategy.hyper["epsilon"] == 0.05 and trainer.strategy.steps == 3
    assert "goes on with epsilon=0.05, as its saved state has it, and not with epsilon=0.4, as given" in said[0]
