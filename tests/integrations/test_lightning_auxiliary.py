"""An auxiliary gamma and beta in Lightning: trained, and kept in checkpoints."""

import pytest
import torch

from apart_hf import create_strategy
from apart_hf.integrations.lightning import Apart
from tests.support.helpers import assert_same, build
from tests.support.lightning_trainer import Scheduled, auxiliary, by_groups, fit, own_loss, saving
from tests.support.loops import ADVPROP, SCALE, batches

pytestmark = pytest.mark.usefixtures("quiet_lightning")


@pytest.mark.parametrize("method", ["advprop", "fast-advprop", "advbn"])
def test_an_auxiliary_gamma_and_beta_are_trained(method):
    """By the rate of the model's own, and its schedule; a run that goes on in another process is the same."""
    hyper = {"advprop": {**ADVPROP, **SCALE}, "fast-advprop": SCALE, "advbn": {"layer": "conv1", "steps": 2}}[method]
    hyper, parts, plain = hyper | {"aux_affine": True}, batches(8, 8, 8), build("small", dtype=torch.float32)
    strategy = create_strategy(method, plain, **hyper)
    optimizer = torch.optim.SGD(by_groups(plain, strategy.parameters()), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for number, part in enumerate(parts):
        torch.manual_seed(number)
        strategy.accumulate(part, own_loss(plain))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    want = plain.state_dict() | auxiliary(strategy)
    begins = create_strategy(method, build("small", dtype=torch.float32), **hyper)
    assert not torch.equal(want["own bn1.weight"], auxiliary(begins)["own bn1.weight"])

    module = Scheduled()
    apart = Apart(method, **hyper | ({"layer": "net.conv1"} if method == "advbn" else {}))
    trainer = fit(module, parts, apart)
    assert_same(module.net.state_dict() | auxiliary(apart.strategy), want, tolerance=0)
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [4, 8]


def test_an_auxiliary_gamma_and_beta_go_on_from_a_checkpoint(tmp_path):
    """Their values, and what the optimizer keeps of them, as of the model's; a second fit goes on, too."""
    hyper, parts = {**ADVPROP, **SCALE, "aux_affine": True}, batches(*[8] * 4)
    whole, apart, second, other = Scheduled(), Apart("advprop", **hyper), Scheduled(), Apart("advprop", **hyper)
    fit(whole, parts, apart, saving(tmp_path, 2), enable_checkpointing=True, resumable=True)
    fit(second, parts, other, path=tmp_path / "step=2.ckpt", resumable=True)
    found = [module.net.state_dict() | auxiliary(one.strategy) for module, one in ((second, other), (whole, apart))]
    assert_same(*found, tolerance=0)
    before = [p.detach().clone() for p in other.strategy.parameters()]
    trainer = fit(second, parts, other)
    assert not any(torch.equal(a, b) for a, b in zip(before, other.strategy.parameters()))
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [4, 8]
