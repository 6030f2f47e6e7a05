"""Checkpoints of Lightning: a run that goes on is the same, and what is said where values differ."""

import pytest
import torch

from apart_hf import ApartError
from apart_hf.integrations.lightning import Apart
from tests.support.helpers import assert_same
from tests.support.lightning_trainer import Module, fit, saving
from tests.support.loops import batches, hyper_of

pytestmark = pytest.mark.usefixtures("quiet_lightning")


class Unseeded(Module):
    def on_train_batch_start(self, batch, batch_idx):
        pass


@pytest.mark.parametrize("own_generator", [True, False])
@pytest.mark.parametrize("method, kept", [("apart", 3), ("random-bn", 6)])
def test_lightning_s_checkpoints_keep_the_state(method, kept, own_generator, tmp_path):
    """Cut off within an epoch of 6 steps and at its end, within `every`, with ratio below 1."""
    parts, path = batches(*[8] * 6), tmp_path / f"step={kept}.ckpt"

    def apart(seed):
        generator = torch.Generator().manual_seed(seed) if own_generator else None
        return Apart(method, every=2, generator=generator, **hyper_of(method, 0.5))

    whole = Unseeded()
    torch.manual_seed(5)
    more = {"max_epochs": 2, "shuffle": not own_generator and kept == 6, "resumable": kept == 3}
    fit(whole, parts, apart(3), saving(tmp_path, kept), enable_checkpointing=True, **more)
    again, other = Unseeded(), apart(4)
    torch.manual_seed(6)
    fit(again, parts, other, path=path, **more)
    assert other.strategy.steps == 12
    assert_same(again.state_dict(), whole.state_dict(), tolerance=0)


def test_resuming_with_other_values_is_said_once(tmp_path, caplog):
    """In one line; what the run itself had set goes on without one, and so does a second fit."""
    parts, path = batches(8, 8), tmp_path / "kept.ckpt"
    first = Apart("apart", groups=2, epsilon=0.1)
    trainer = fit(Module(), parts, first)
    first.strategy.set(epsilon=0.05)
    trainer.save_checkpoint(path)
    for epsilon, count in ((0.1, 0), (0.4, 1)):
        caplog.clear()
        other, module = Apart("apart", groups=2, epsilon=epsilon), Module()
        for epochs in (2, 3):
            fit(module, parts, other, path=path if epochs == 2 else None, max_epochs=epochs)
        said = [record.getMessage() for record in caplog.records if "goes on with" in record.getMessage()]
        assert len(said) == count and other.strategy.hyper["epsilon"] == 0.05 and other.strategy.steps > 4
    assert "goes on with epsilon=0.05, as its saved state has it, and not with epsilon=0.4, as given" in said[0]
    with pytest.raises(ApartError, match="the state is of the method 'sam', and goes on with 'sam-on'"):
        trainer = fit(Module(), parts, Apart("sam"))
        trainer.save_checkpoint(path)
        fit(Module(), parts, Apart("sam-on"), path=path, max_epochs=2)
