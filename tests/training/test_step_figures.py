"""What training shows by step is what the oracle and the trainer compute; nothing waits for it between reports."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from apart_hf import create_strategy
from apart_hf.training.step_figures import StepFigures
from apart_hf.training.trainer import Trainer
from tests.reference import reference_step
from tests.support.helpers import assert_same, batch, build
from tests.support.ranks import RANKS, on_two_ranks, start_rank

HYPER = {"apart": {"groups": 2}, "apart-sam": {"groups": 2, "rho": 0.2}, "sam": {"rho": 0.1}}
LR, ROWS, SIZE = 1e-4, 48, 8


def told(method, *, interval, accumulated=1, epochs=1, every=1, hyper=None, lr=LR, model=None, own=None, **more):
    """(steps and their figures, the trainer), over six batches an epoch, or those of this process's `own` rows."""
    model = model or build("test_byobnet")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    images, labels = (part if own is None else part[own] for part in batch(ROWS))
    loader = torch.utils.data.DataLoader(list(zip(images, labels.tolist())), batch_size=SIZE)
    if own is None:
        loader = accelerator.prepare(loader)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=lr))
    hyper = HYPER.get(method, {}) if hyper is None else hyper
    strategy = create_strategy(method, model, accelerator=accelerator, every=every, **hyper)
    one = Trainer(
        accelerator, model, strategy, optimizer, None, cross_entropy, loader, loader, log_interval=interval, **more
    )
    steps = []
    one.figures = StepFigures(one, lambda *found: steps.append(found))
    for _ in range(epochs):
        one.train_epoch("test")
        one.progress.end_epoch()
    return steps, one


def by_the_oracle(method, accumulated):
    """What each step shows: losses of its batches in both passes, hits, gradient norm, share of zero deltas."""
    model, parts = build("test_byobnet"), list(zip(*(part.split(SIZE) for part in batch(ROWS))))
    found = []
    for start in range(0, len(parts), accumulated):
        losses, perturbed, hits, sums, zeros = [], [], 0, {}, None
        for x, y in parts[start : start + accumulated]:
            seen = []

            def criterion(output, targets, seen=seen):
                seen.append((output, cross_entropy(output, targets)))
                return seen[-1][1]

            gradients, buffers, deltas = reference_step(model, x, y, criterion, method, **HYPER.get(method, {}))
            (output, loss), *second = seen
            losses.append(loss.item())
            hits += (output.argmax(1) == y).sum().item()
            if second:
                perturbed.append(torch.stack([one for _, one in second]).mean().item())
            deltas = [part.flatten() for pair in deltas.values() for part in pair]
            zeros = (torch.cat(deltas) == 0).double().mean().item() if deltas else None
            for name, g in gradients.items():
                sums[name] = sums.get(name, 0) + g / accumulated
            model.load_state_dict(dict(model.state_dict()) | buffers)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= LR * sums[name]
        norm = torch.cat([g.flatten() for g in sums.values()]).norm().item()
        found.append({"losses": losses, "perturbed": perturbed, "hits": hits, "norm": norm, "zeros": zeros})
    return found


@pytest.mark.parametrize("method", ["standard", "apart", "apart-sam", "sam"])
@pytest.mark.parametrize("interval, accumulated", [(1, 1), (2, 1), (3, 2)])
def test_figures_are_those_of_the_oracle(method, interval, accumulated):
    want = by_the_oracle(method, accumulated)
    found, _ = told(method, interval=interval, accumulated=accumulated)
    assert [step for step, _ in found] == list(range(interval, len(want) + 1, interval))
    for step, figures in found:
        since = want[step - interval : step]
        losses = [loss for one in since for loss in one["losses"]]
        perturbed = [loss for one in since for loss in one["perturbed"]]
        assert figures.pop("lr") == LR
        assert figures.pop("train/loss") == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        assert figures.pop("train/top1") == pytest.approx(100 * sum(one["hits"] for one in since) / SIZE / len(losses))
        assert figures.pop("train/grad_norm") == pytest.approx(want[step - 1]["norm"], rel=1e-6)
        if perturbed:
            assert figures.pop("train/perturbed_loss") == pytest.approx(sum(perturbed) / len(perturbed), rel=1e-6)
        if "apart" in method:
            assert figures.pop("train/zero_deltas") == pytest.approx(want[step - 1]["zeros"])
        assert figures == {}


def test_zero_deltas_are_those_of_dead_channels():
    """delta_sigma is zero where gamma is; of frozen layers nothing counts."""
    model = build("test_byobnet")
    layers = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for layer in layers:
            layer.weight[::2] = 0.0
    (_, first), *_ = told("apart", interval=1, model=copy.deepcopy(model))[0]
    dead = sum((layer.weight == 0).sum().item() for layer in layers)
    components = 2 * sum(layer.num_features for layer in layers)
    assert dead / components <= first["train/zero_deltas"] < 1
    strategy = create_strategy("apart", model, groups=2)
    assert strategy.figures()["zero_deltas"].isnan()
    for layer in layers[1:]:
        layer.eval()
    strategy.accumulate_gradients(*batch(8), cross_entropy)
    (statistics,) = strategy.perturbations
    deltas = torch.cat([part.flatten() for part in statistics._fixed[next(iter(statistics.layers))]])
    assert len(deltas) == 2 * layers[0].num_features
    assert strategy.figures()["zero_deltas"].item() == pytest.approx((deltas == 0).double().mean().item())


def test_the_loss_of_a_second_pass_is_of_the_latest_batch():
    strategy = create_strategy("apart", build("test_byobnet"), groups=2, every=2)
    seen = []
    for _ in range(4):
        strategy.accumulate_gradients(*batch(8), cross_entropy)
        seen.append(strategy.perturbed_loss)
    assert seen[0] is None and seen[2] is None
    assert seen[1].requires_grad is seen[3].requires_grad is False and seen[1] > 0 and seen[3].shape == ()


def test_steps_without_a_second_pass_show_none():
    found, _ = told("apart", interval=1, every=3)
    assert [step for step, figures in found if "train/perturbed_loss" in figures] == [3, 6]
    assert [step for step, figures in found if "train/zero_deltas" in figures] == [3, 6]
    found, _ = told("apart", interval=2, every=3)
    assert [step for step, figures in found if "train/perturbed_loss" in figures] == [4, 6]


def test_steps_are_counted_over_epochs_and_epsilon_by_its_schedule_is_shown():
    found, one = told("apart", interval=4, epochs=2, hyper_schedule=lambda steps: {"epsilon": 0.01 * steps})
    assert [step for step, _ in found] == [4, 8, 12] and one.progress.steps == 12
    assert [figures["train/epsilon"] for _, figures in found] == [0.03, 0.07, 0.11]


def test_a_step_that_is_left_out_counts_for_nothing():
    nan = []

    class Criterion(torch.nn.Module):
        def forward(self, output, targets):
            nan.append(1)
            return cross_entropy(output, targets) * (torch.nan if len(nan) == 3 else 1.0)

    model = build("test_byobnet")
    plain, _ = told("standard", interval=6, model=copy.deepcopy(model), lr=0.0)
    found, one = told("standard", interval=1, model=copy.deepcopy(model), lr=0.0)
    values = [figures["train/loss"] for _, figures in found]
    one.criterion, one.skip_nonfinite, one.guard.skip, one.log_interval = Criterion(), True, True, 6
    seen = []
    one.figures = StepFigures(one, lambda *found: seen.append(found))
    one.progress.steps = 0
    one.train_epoch("test")
    ((step, figures),) = seen
    assert step == 6 and one.guard.skipped == 1
    assert figures["train/loss"] == pytest.approx(sum(values[:2] + values[3:]) / 5, rel=1e-5)
    assert plain[0][1]["train/loss"] == pytest.approx(sum(values) / 6, rel=1e-5)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_the_weights_are_those_without_figures(clip):
    """The norm is of the gradient before it is clipped."""
    one, two = build("test_byobnet"), build("test_byobnet")
    found, _ = told("apart-sam", interval=1, model=one, clip_grad=clip)
    told("apart-sam", interval=100, model=two, clip_grad=clip)
    assert_same(dict(one.state_dict()), dict(two.state_dict()), tolerance=0)
    assert all(figures["train/grad_norm"] > 1e-2 for _, figures in found)


def test_devices_are_asked_when_it_is_due_alone(monkeypatch):
    asked = []
    reduce = Accelerator.reduce
    monkeypatch.setattr(Accelerator, "reduce", lambda self, *given: asked.append(1) or reduce(self, *given))
    monkeypatch.setattr(StepFigures, "is_due", lambda self, step: step == 5)
    found, _ = told("apart", interval=1)
    assert [step for step, _ in found] == [5]
    assert len(asked) == 2  # and once at the end of the epoch


def rank(number, folder):
    """Each process has half of the images of a batch."""
    start_rank(number, folder)
    own = [row for row in range(ROWS) if row % (RANKS * SIZE) // SIZE == number]
    torch.save(told("apart", interval=1, own=own)[0], folder / f"{number}.pt")


@pytest.mark.process
def test_processes_join_their_figures(tmp_path):
    """The oracle of both: their mean loss and the norm of the mean gradient; what they attack by is one."""
    one, other = on_two_ranks(rank, tmp_path)
    assert one == other and [step for step, _ in one] == [1, 2, 3]
    model, (images, labels) = build("test_byobnet"), (part[: RANKS * SIZE] for part in batch(ROWS))
    losses = []

    def criterion(output, targets):
        losses.append((len(targets), cross_entropy(output, targets)))
        return losses[-1][1]

    gradients, _, deltas = reference_step(model, images, labels, criterion, "apart", ranks=RANKS, **HYPER["apart"])
    clean = [loss.item() for size, loss in losses if size == SIZE]
    perturbed = [loss.item() for size, loss in losses if size < SIZE]
    assert len(clean) == RANKS and len(perturbed) == RANKS * 2
    _, figures = one[0]
    assert figures["train/loss"] == pytest.approx(sum(clean) / RANKS, rel=1e-6)
    assert figures["train/perturbed_loss"] == pytest.approx(sum(perturbed) / len(perturbed), rel=1e-6)
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
    assert figures["train/grad_norm"] == pytest.approx(norm, rel=1e-6)
    zeros = torch.cat([part.flatten() for pair in deltas.values() for part in pair]) == 0
    assert figures["train/zero_deltas"] == pytest.approx(zeros.double().mean().item())
