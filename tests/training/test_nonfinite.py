"""Steps whose loss or gradient is not finite: what the guard says and leaves."""

import copy
import socket

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf.training import nonfinite
from apart_hf.training.nonfinite import NonFinite
from tests.support.helpers import assert_same, build
from tests.support.ranks import on_two_ranks
from tests.support.trainers import batches, trainer


def everything(one):
    """Weights, buffers, averages and momentum."""
    state = {**one.model.state_dict(), **{f"ema {k}": v for k, v in one.ema.module.state_dict().items()}}
    names = {p: n for n, p in one.model.named_parameters()}
    return state | {f"momentum {names[p]}": s["momentum_buffer"] for p, s in one.optimizer.state.items()}


@pytest.mark.parametrize("method", ["standard", "apart", "sam", "apart-sam"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_that_is_left_out_leaves_no_trace(method, accumulated):
    """State and figures are those of a run over the batches of the other steps alone, bit for bit."""
    model = build("test_byobnet")
    step = 3 // accumulated * accumulated  # its first batch
    all_of_them = batches(6, bad=[3])
    runs, found = [], []
    for data in (all_of_them, all_of_them[:step] + all_of_them[step + accumulated :]):
        mine = copy.deepcopy(model)
        runs.append(trainer(mine, data, method, accumulated, ema=ModelEmaV3(mine, decay=0.9), skip_nonfinite=True))
        found.append(next(iter(runs[-1].fit(1))).as_line())
    assert_same(*(everything(run) for run in runs), tolerance=0)
    assert [metrics.pop("skipped_steps") for metrics in found] == [1, 0]
    timing = {"seconds", "images_per_second"}
    assert all(found[0][key] == found[1][key] for key in found[0].keys() - timing)
    assert runs[0].progress.steps == runs[1].progress.steps + 1


class Overflowing(nn.Module):
    """Its second layer computes more than float64 holds."""

    def __init__(self):
        super().__init__()
        self.bn, self.large, self.fc = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.Linear(3, 5)

    def forward(self, x):
        return self.fc(self.large(self.bn(x)).mul(self.factor).relu().mean((2, 3)))

    factor = 1.0


def causes(name):
    """A model, batches and criterion whose second step fails, and what is to be said of it."""
    torch.manual_seed(0)
    model, data, criterion = Overflowing().double(), batches(3), cross_entropy
    if name == "images":
        return model, batches(3, bad=[1]), criterion, "loss nan, .* are in the images"
    if name == "parameter":
        return model, data, criterion, "loss nan, .* are in the parameter large.weight"
    if name == "layer":
        return model, data, criterion, "loss nan, .* are in the output of layer large"
    if name == "statistic":  # x / inf is zero: neither loss nor gradient show it
        data[1][0][:] = 1e200 * torch.randn(data[1][0].shape, dtype=torch.float64)
        return model, data, criterion, "loss [0-9.]+, .* are in bn.running_var"

    def endless(output, targets):  # the slope of a square root at zero
        return cross_entropy(output, targets) + (output.sum() * 0).abs().sqrt()

    return model, data, endless, "loss [0-9.]+, .* are in the gradient of fc.bias"


@pytest.mark.parametrize("name", ["images", "parameter", "layer", "statistic", "gradient"])
def test_what_the_message_names(name):
    model, data, criterion, said = causes(name)
    one = trainer(model, data, "standard")

    def harm():  # after the first step
        one.criterion = criterion
        if name == "parameter":
            with torch.no_grad():
                model.large.weight[0, 0] = torch.nan
        if name == "layer":
            with torch.no_grad():
                model.large.weight.fill_(1e308)

    one.after_step = harm
    with pytest.raises(NonFinite, match=f"^step 2: .*{said}") as raised:
        one.train_epoch("test")
    assert "learning rate 0.01;" in str(raised.value) and "\n" not in str(raised.value)
    assert one.progress.steps == 1  # the second was not made
    if name in ("images", "gradient"):
        weights = copy.deepcopy(model)
        reference = trainer(causes(name)[0], batches(1), "standard")
        reference.train_epoch("test")
        assert_same(dict(weights.named_parameters()), dict(reference.model.named_parameters()), tolerance=0)


@pytest.mark.parametrize("where", ["weight", "momentum", "average"])
def test_nothing_is_kept_of_a_state_that_is_not_finite(where):
    model = build("test_byobnet")
    one = trainer(model, batches(1), opt=torch.optim.AdamW, ema=ModelEmaV3(model))
    one.train_epoch("test")
    one.state()
    tensor, said = {
        "weight": (model.head.fc.weight, "head.fc.weight"),
        "momentum": (one.optimizer.state[model.head.fc.weight]["exp_avg_sq"], "exp_avg_sq of head.fc.weight"),
        "average": (one.ema.module.head.fc.weight, "the average of head.fc.weight"),
    }[where]
    tensor.data[0, 0] = torch.inf
    with pytest.raises(NonFinite, match=f"after step 1, at learning rate 0.01, .*{said} is not finite"):
        one.state()


def test_weights_that_are_lost_cannot_be_saved_by_skipping():
    one = trainer(build("test_byobnet"), batches(2), skip_nonfinite=True)

    def lose():
        one.model.head.fc.weight.data[0, 0] = torch.nan

    one.after_step = lose
    with pytest.raises(NonFinite, match=r"step 2: .* in the parameter head.fc.weight. It is too late to leave the st"):
        one.train_epoch("test")


def test_patience(monkeypatch):
    monkeypatch.setattr(nonfinite, "PATIENCE", 3)
    one = trainer(build("test_byobnet"), batches(9, bad=[1, 2, 4, 5, 6, 7]), skip_nonfinite=True)
    with pytest.raises(NonFinite, match=r"step 7, the 3th in a row to be left out: .*the images"):
        one.train_epoch("test")
    assert one.guard.take_skipped() == 5
    none = trainer(build("test_byobnet"), batches(2, bad=[0, 1]), skip_nonfinite=True)
    with pytest.raises(NonFinite, match="step 2: the whole epoch had no step with finite loss and gradient"):
        none.train_epoch("test")


def with_scaler(one, scale, backoff=0.5):
    """As accelerate sets up float16 on a GPU; here gradients overflow for their scale alone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=backoff)
    one.accelerator.scaler = one.optimizer.scaler = scaler
    from accelerate.optimizer import patch_optimizer_step

    one.optimizer._accelerate_step_called = False
    one.optimizer._optimizer_original_step_method = one.optimizer.optimizer.step
    one.optimizer._optimizer_patched_step_method = patch_optimizer_step(one.optimizer, one.optimizer.optimizer.step)
    return scaler


def test_gradients_that_overflow_for_their_scale_are_no_fault(monkeypatch):
    """The scaler leaves such steps out and lowers the scale; a loss that is not finite is a fault here too."""
    model = build("test_byobnet", dtype=torch.float32)
    data = [(images.float(), labels) for images, labels in batches(6, bad=[5])]
    one = trainer(model, data, "standard")
    one.optimizer.param_groups[0]["lr"] = 1e-8
    one.criterion = lambda output, targets: 1e6 * cross_entropy(output, targets)
    scaler, rows = with_scaler(one, 2.0**120, backoff=2.0**-60), []
    before = model.head.fc.weight.clone()
    one.after_step = lambda: rows.append((scaler.get_scale(), torch.equal(model.head.fc.weight, before)))
    with pytest.raises(NonFinite, match="step 6: loss nan"):
        one.train_epoch("test")
    assert rows == [(2.0**60, True)] + 4 * [(2.0**60, False)]
    monkeypatch.setattr(nonfinite, "PATIENCE", 2)
    again = trainer(model, data[:4], "standard")
    again.criterion = one.criterion
    with_scaler(again, 2.0**120, backoff=0.999)
    with pytest.raises(NonFinite, match=r"step 2: the gradient has overflowed in 2 steps in a row, at a gradient scal"):
        again.train_epoch("test")


def two_ranks(rank, folder):
    import os

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": (folder / "port").read_text(),
        "ACCELERATE_USE_CPU": "true",
    }
    one = trainer(build("test_byobnet"), batches(6, bad=[3]), skip_nonfinite=True)  # the second step of rank 1
    metrics = one.train_epoch("test")
    found = {
        "state": copy.deepcopy(one.accelerator.unwrap_model(one.model).state_dict()),
        "steps": one.progress.steps,
        "skipped": one.guard.take_skipped(),
        "loss": metrics.train_loss,
    }
    one.guard.skip, one.progress.batch, one.progress.totals = False, 0, None  # the same epoch again
    try:
        one.train_epoch("test")
    except NonFinite as error:
        found["said"] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.process
def test_both_processes_leave_out_the_step_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    one, other = on_two_ranks(two_ranks, tmp_path)
    assert one["steps"] == other["steps"] == 3 and one["skipped"] == other["skipped"] == 1
    assert one["loss"] == other["loss"] > 0
    weights = dict(build("test_byobnet").named_parameters())
    assert all(torch.equal(one["state"][n], other["state"][n]) for n in weights)
    assert all(t.isfinite().all() for found in (one, other) for t in found["state"].values())
    assert not torch.equal(one["state"]["head.fc.weight"], weights["head.fc.weight"])
    assert one["said"] == other["said"] and "step 5: loss nan" in one["said"] and "in the images" in one["said"]
