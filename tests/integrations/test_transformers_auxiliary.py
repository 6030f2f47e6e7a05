"""An auxiliary gamma and beta in transformers' Trainer: trained, and kept in checkpoints."""

import pytest
import torch

from apart_hf import create_strategy
from apart_hf.integrations.transformers import ApartTrainer
from tests.support.helpers import assert_same
from tests.support.loops import ADVPROP, batches
from tests.support.transformers_trainer import OurTrainer, auxiliary, made, normalised, own_loss, rows, trained

AUXILIARY = {
    "advprop": {**ADVPROP, "aux_affine": True, "random_start": True},
    "fast-advprop": {"aux_affine": True},
    "advbn": {"layer": "net.conv1", "steps": 2, "aux_affine": True},
}


@pytest.mark.parametrize("made_by", ["us", "the trainer"])
@pytest.mark.parametrize("method", AUXILIARY)
def test_an_auxiliary_gamma_and_beta_are_trained(method, made_by, arguments):
    """By an optimizer that is given, and by the trainer's own, whose groups stay as many."""
    parts, model, plain, hyper = batches(8, 8, 8), normalised(), normalised(), AUXILIARY[method]
    mine = {f"apart_{key}": value for key, value in hyper.items()}
    args = arguments(method, optim="sgd", learning_rate=0.05, lr_scheduler_type="constant", **mine)
    if made_by == "us":
        trainer = made(OurTrainer, model, args, parts)
    else:
        trainer = OurTrainer(model, args, train_dataset=rows(parts))
    trainer.train()
    strategy = create_strategy(method, plain, **hyper)
    begins = auxiliary(strategy)
    momentum = 0.9 if made_by == "us" else 0.0
    optimizer = torch.optim.SGD([*plain.parameters(), *strategy.parameters()], lr=0.05, momentum=momentum)
    for number, part in enumerate(parts):
        torch.manual_seed(number)
        strategy.accumulate(part, own_loss(plain))
        optimizer.step()
        optimizer.zero_grad()
    want = plain.state_dict() | auxiliary(strategy)
    assert_same(model.state_dict() | auxiliary(trainer.strategy), want, tolerance=0)
    assert not any(
        torch.equal(want[f"own net.bn1.{kind}"], begins[f"own net.bn1.{kind}"]) for kind in ("weight", "bias")
    )
    counts = [len(group["params"]) for group in trainer.optimizer.param_groups]
    assert sum(counts) == len(list(plain.parameters())) + 4 and len(counts) == (1 if made_by == "us" else 2)


@pytest.mark.parametrize("restores_callbacks", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("method", AUXILIARY)
def test_checkpoints_keep_auxiliary_batchnorm(method, affine, restores_callbacks, arguments, tmp_path):
    """Bit for bit, in JSON; a second call of `train` goes on with the optimizer's parameters."""
    parts = batches(*[8] * 4)
    mine = {f"apart_{key}": value for key, value in (AUXILIARY[method] | {"aux_affine": affine}).items()}
    more = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": restores_callbacks}
    args, whole, again = arguments(method, **more, **mine), normalised(), normalised()
    first = trained(ApartTrainer, whole, args, parts)
    trainer = made(ApartTrainer, again, args, parts)
    for _ in range(2):
        trainer.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-2"))
        want = whole.state_dict() | auxiliary(first.strategy)
        assert_same(again.state_dict() | auxiliary(trainer.strategy), want, tolerance=0)
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    own = list(trainer.strategy.parameters())
    assert len(own) == 4 * affine and all(any(p is one for one in held) for p in own)
    assert len(held) == len(list(again.parameters())) + len(own)
