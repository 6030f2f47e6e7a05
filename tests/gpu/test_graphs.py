"""Training steps as CUDA graphs, and that a step waits for no number; what the CPU can show is in tests/training."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.utils import ModelEmaV3

from apart_hf.paper.step_costs import Contender, StepCase
from apart_hf.training.cuda_graph import WARM_UP
from tests.support.helpers import assert_same, batch, build
from tests.support.trainers import SIZE, trainer

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU: torch.cuda.is_available() is False"),
]
SGD = partial(torch.optim.SGD, momentum=0.9, fused=True)  # as graphs have it


def make(method, layout, dtype=torch.float64, **more):
    model = build("test_resnet", dtype=dtype).to("cuda", memory_format=LAYOUTS[layout])
    more = {"opt": SGD, "clip_grad": 1.0, "ema": ModelEmaV3(model, use_warmup=True), "log_interval": 50} | more
    one = trainer(model, [batch(SIZE)], method, cpu=False, **more)
    one.strategy.generator = torch.Generator("cuda").manual_seed(0)
    one.model.train()
    return one


def data(steps, layout, dtype=torch.float64):
    for seed in range(steps):
        images, labels = batch(SIZE, dtype=dtype, seed=seed)
        yield images.to("cuda").contiguous(memory_format=LAYOUTS[layout]), labels.to("cuda")


def rates(one, step):
    """A schedule without one of timm's."""
    for group in one.optimizer.param_groups:
        group["lr"] = 2.0 ** -(6 + step // 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["standard", "apart", "sam", "apart-sam", "ghost-bn"])
def test_replayed_steps_are_those_of_the_eager_trainer(method, layout):
    """In float64, in which what kernels add up in another order does not show."""
    left, losses = [], []
    for is_recorded in (False, True):
        one = make(method, layout, cuda_graph=is_recorded)
        assert (one.graphs is not None) == is_recorded
        shown = []
        for step, part in enumerate(data(12, layout)):
            rates(one, step)
            loss, output = one.train_step(*part)
            shown.append(torch.stack([loss, output.sum()]).cpu())
        losses.append(torch.stack(shown))
        average = {f"average {name}": value for name, value in one.ema.module.state_dict().items()}
        state = one.model.state_dict() | average
        left.append({name: value.double().cpu() for name, value in state.items()})
    assert not is_recorded or len(one.graphs._graphs) == 1
    assert_same({"losses": losses[1]}, {"losses": losses[0]}, tolerance=1e-8)
    assert_same(left[1], left[0], tolerance=1e-8)


@pytest.mark.parametrize("method, hyper", [("random-bn", {"groups": 2}), ("apart", {"groups": 1, "ratio": 0.5})])
def test_each_replay_draws_anew(method, hyper):
    one = make(method, "nchw", cuda_graph=True, hyper=hyper)
    (part,) = data(1, "nchw")
    for group in one.optimizer.param_groups:
        group["lr"] = 0.0
    losses = []
    for _ in range(12):
        one.train_step(*part)
        losses.append(one.strategy.perturbed_loss.item())
    assert len(one.graphs._graphs) == 1 and len(set(losses[4:])) > 4


def test_a_step_of_the_benchmark_is_replayed():
    """In float32, and so only nearly the same."""
    case = StepCase("test_resnet", 8, 32, 2, num_classes=5, device="cuda")
    plain, other = (Contender(replace(case, cuda_graph=is_recorded), "apart") for is_recorded in (False, True))
    for _ in range(WARM_UP):
        plain.step()
    for _ in range(3):
        plain.step()
        other.step()
    want = {name: p.detach().cpu() for name, p in plain.model.named_parameters()}
    assert_same({name: p.detach().cpu() for name, p in other.model.named_parameters()}, want, tolerance=1e-2)


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["standard", "apart", "apart-sam", "asam", "random-bn", "ghost-bn"])
def test_twenty_steps_wait_for_nothing(method, layout, cuda_graph):
    """After those in which tables of places are made, libraries choose their kernels, and a graph is recorded."""
    hyper = {"ratio": 0.5, "groups": 2} if method in ("apart", "random-bn") else None
    one = make(method, layout, torch.float32, cuda_graph=cuda_graph, hyper=hyper)
    steps = list(data(25, layout, torch.float32))
    for part in steps[:5]:
        one.progress.count(*one.train_step(*part), part[1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part in steps[5:]:
            one.progress.count(*one.train_step(*part), part[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert one.progress.steps == 25
