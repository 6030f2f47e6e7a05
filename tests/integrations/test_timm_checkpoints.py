"""timm's checkpoints: a run that goes on is the same, and what is said where values differ."""

import pytest
import torch
from timm.task._helpers import resume_task_checkpoint
from timm.utils import CheckpointSaver

from apart_hf.integrations.timm import apart
from tests.support.helpers import assert_same, batch, build
from tests.support.timm_task import task_of, train


@pytest.mark.parametrize("ratio", [1, 0.5])
def test_timm_s_checkpoints_keep_the_state(ratio, tmp_path):
    """Cut off between two epochs, with ratio below 1 and within `every`."""
    parts = [batch(8, 16, seed=k, dtype=torch.float32) for k in range(6)]
    more = {"groups": 2, "ratio": ratio, "every": 2}
    whole = build("small", dtype=torch.float32)
    task = apart(task_of(whole), "apart", generator=torch.Generator().manual_seed(5), **more)
    train(task, parts[:3])
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.05)
    saver = CheckpointSaver(whole, optimizer, task=task, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    train(task, parts[3:])
    again = build("small", dtype=torch.float32, seed=9)
    other = apart(task_of(again), "apart", generator=torch.Generator(), **more)
    assert resume_task_checkpoint(other, str(tmp_path / "last.pth.tar"), log_info=False) == 1
    assert other.forward.loss.strategy.steps == 3
    train(other, parts[3:])
    assert_same(again.state_dict(), whole.state_dict(), tolerance=0)
    plain = task_of(
        build("small", dtype=torch.float32)
    )  # a checkpoint without our part, and one with it in a plain task
    saver = CheckpointSaver(whole, optimizer, task=plain, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    resume_task_checkpoint(plain, str(tmp_path / "last.pth.tar"), log_info=False)
    saver.save_checkpoint(1, metric=2.0)
    resume_task_checkpoint(other, str(tmp_path / "last.pth.tar"), log_info=False)
    assert other.forward.loss.strategy.steps == 6


def test_resuming_with_other_values_is_said_once(tmp_path, caplog):
    """Also where the module is wrapped after the script has resumed."""

    def task_with(**hyper):
        model = build("small", dtype=torch.float32)
        return model, apart(task_of(model), "apart", groups=2, **hyper)

    model, task = task_with(epsilon=0.1)
    train(task, [batch(8, 16, dtype=torch.float32)])
    task.forward.loss.set(epsilon=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    saver = CheckpointSaver(model, optimizer, task=task, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    for hyper, said in (({"epsilon": 0.1}, 0), ({"epsilon": 0.4}, 1)):
        caplog.clear()
        _, other = task_with(**hyper)
        resume_task_checkpoint(other, str(tmp_path / "last.pth.tar"), log_info=False)
        other.compile(backend="eager")
        other(*batch(8, 16, dtype=torch.float32))
        found = [record.getMessage() for record in caplog.records if "goes on with" in record.getMessage()]
        assert len(found) == said and other.forward.loss.strategy.hyper["epsilon"] == 0.05
        assert other.forward.loss.strategy.steps == 2
    assert "apart goes on with epsilon=0.05, as its saved state has it, and not with epsilon=0.4, as given" in found[0]
    torch._dynamo.reset()
