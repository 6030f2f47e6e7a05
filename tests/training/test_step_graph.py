"""Steps that are recorded and replayed against those of the eager trainer, bit for bit.

What is recorded are operations on tensors in their places, as a CUDA graph holds them: a number of Python that changes
from step to step, a tensor that is made anew, and a look at the device would each show here.
"""

import copy
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.optim import Lamb, Lookahead, create_optimizer_v2
from timm.scheduler import StepLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from apart_hf.batchnorm import use_kernels
from apart_hf.training.cuda_graph import WARM_UP
from apart_hf.training.graph_obstacles import obstacles
from apart_hf.training.nonfinite import NonFinite
from apart_hf.training.step_figures import StepFigures
from apart_hf.training.step_graph import StepGraphs
from tests.support.helpers import assert_same, batch, build
from tests.support.recorded import RecordedOperations
from tests.support.trainers import batches, trainer

# fused, as graphs have it; and rates that are the same in float32
SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=2**-10, nesterov=True, fused=True)
RATE = 2**-6
FULL = 6  # batches of an epoch, and a smaller one
DATA = [*(batch(8, 16, seed=k) for k in range(FULL)), batch(6, 16, seed=FULL)]
GROUPS = {"groups": 2}  # which both sizes have


@pytest.fixture(autouse=True)
def a_device():
    with use_kernels("device"):
        yield


def make(name="small", method="apart", *, hyper=None, layout=torch.contiguous_format, opt=SGD, drawn=False, **more):
    """A trainer with all that a step may have: a schedule of each step, clipping, an average that warms up."""
    model = build(name).to(memory_format=layout)
    ema = ModelEmaV3(model, decay=0.9, use_warmup=True)
    options = {"clip_grad": 0.5, "ema": ema, "log_interval": 4} | more
    hyper = GROUPS | (hyper or {}) if "apart" in method or "-bn" in method else hyper
    one = trainer(model, DATA, method, opt=opt, hyper=hyper, **options)
    for group in one.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = RATE
    one.scheduler = StepLRScheduler(one.optimizer, decay_t=2, decay_rate=0.5, t_in_epochs=False)
    if drawn:
        one.strategy.generator = torch.Generator().manual_seed(3)
    return one


def recorded(one, **options):
    generator = one.strategy.generator
    one.graphs = StepGraphs(one, one._step, RecordedOperations([] if generator is None else [generator], **options))
    return one.graphs._recorder


def train(one, epochs=2):
    """Train and return all that it shows and leaves."""
    torch.manual_seed(0)
    np.random.seed(0)
    told = []
    one.figures = StepFigures(one, lambda step, figures: told.append((step, figures)))
    for _ in range(epochs):
        told.append(vars(one.train_epoch("test")) | {"images_per_second": 0, "seconds": 0})
        one.progress.end_epoch()
    return told, left(one)


def left(one):
    state = {f"optimizer's {k} {key}": v for k, of in enumerate(one.optimizer.state.values()) for key, v in of.items()}
    average = {f"average {name}": value for name, value in one.ema.module.state_dict().items()}
    return one.model.state_dict() | average | {key: value for key, value in state.items() if value is not None}


MIXUP = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=5)


def mixed(images, labels):
    images, targets = MIXUP(images.clone(), labels)
    return images, targets.double()


CASES = {
    "standard": ({"method": "standard"}, 1),
    "apart": ({"log_interval": 3}, 1),
    "apart, half of the batch": ({"hyper": {"ratio": 0.5, "groups": 1}, "drawn": True}, 1),
    "apart, channels_last": ({"layout": torch.channels_last}, 1),
    "apart, a timm model": ({"name": "test_resnet"}, 1),
    "sam": ({"method": "sam"}, 1),
    "apart-asam": ({"method": "apart-asam"}, 1),
    "random-bn": ({"method": "random-bn", "drawn": True}, 1),
    "ghost-bn": ({"method": "ghost-bn", "layout": torch.channels_last}, 1),
    "no momentum, clipped by value": ({"opt": partial(torch.optim.SGD, fused=True), "clip_mode": "value"}, 1),
    "clipped by unit": ({"clip_mode": "agc", "clip_grad": 0.01}, 1),
    "mixup, which the host draws": ({"mixup": mixed}, 1),
    "the first epoch is plain": ({"perturb_from_epoch": 2}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_are_those_of_the_eager_trainer(case):
    options, kinds = CASES[case]
    want_told, want = train(make(**options))
    one = make(**options)
    recorder = recorded(one)
    told, found = train(one)
    assert told == want_told
    assert_same(found, want, tolerance=0)
    assert one.progress.steps == one.strategy.steps == 2 * FULL + 2
    assert recorder.recorded == kinds and recorder.replayed == 2 * FULL - kinds * WARM_UP


def test_steps_with_and_without_a_second_pass_are_two_graphs():
    found = []
    for is_recorded in (False, True):
        one = make()
        one.strategy.set(every=2)
        recorder = recorded(one) if is_recorded else None
        found.append(train(one, epochs=3))
    assert found[0][0] == found[1][0]
    assert_same(found[1][1], found[0][1], tolerance=0)
    assert recorder.recorded == 2 and recorder.replayed == 3 * FULL - 2 * WARM_UP


def test_nothing_is_recorded_while_a_schedule_moves_epsilon():
    found = []
    for is_recorded in (False, True):
        one = make(hyper_schedule=lambda steps: {"epsilon": 0.1 * min(1.0, steps / 7)})
        recorder = recorded(one) if is_recorded else None
        found.append(train(one))
    assert found[0][0] == found[1][0]
    assert_same(found[1][1], found[0][1], tolerance=0)
    assert recorder.recorded == 1 and recorder.replayed == 2 * FULL - 6 - WARM_UP  # from step 8 on, one is smaller


def test_dropout_is_drawn_in_each_step():
    found = []
    for is_recorded in (False, True):
        one = make("test_resnet")
        for layer in one.model.modules():
            if isinstance(layer, nn.Identity):
                layer.forward = partial(nn.functional.dropout, p=0.1, training=True)
        recorder = recorded(one) if is_recorded else None
        found.append(train(one, epochs=1))
    assert found[0][0] == found[1][0] and recorder.replayed == FULL - WARM_UP
    assert_same(found[1][1], found[0][1], tolerance=0)


# with tolerances of all weights: those of graphs compute powers of beta in float32
CAPTURABLE = {
    "adam": 1e-4,
    "adamw": 1e-4,
    "nadam": 1e-4,
    "radam": 1e-4,
    "adamax": 1e-4,
    "adadelta": 0,
    "rmsprop": 1e-12,
}


@pytest.mark.parametrize("opt", CAPTURABLE)
def test_other_optimizers(opt, monkeypatch):
    kind = type(create_optimizer_v2(nn.Linear(2, 2), opt=opt, lr=0.1))
    for module in {sys.modules[base.__module__] for base in kind.__mro__}:
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda **_: ["cpu"], raising=False)
    eager, stepped, replayed = (make(opt=kind) for _ in range(3))
    _, want = train(eager)
    recorder = recorded(stepped)
    recorder.record = lambda call: call  # the same code, of which Python runs each step
    told, same = train(stepped)
    recorder = recorded(replayed, constants=True)  # on the CPU they count their steps by one
    assert train(replayed)[0] == told and recorder.replayed == 2 * FULL - WARM_UP
    assert_same(left(replayed), same, tolerance=0)
    weights = [name for name, _ in eager.model.named_parameters()]
    assert_same({n: same[n] for n in weights}, {n: want[n] for n in weights}, CAPTURABLE[opt])


def test_groups_and_checkpoints_have_numbers():
    one, other = make(), make()
    recorded(one)
    train(one), train(other)
    for ours, theirs in zip(one.optimizer.state_dict()["param_groups"], other.optimizer.state_dict()["param_groups"]):
        assert ours == theirs and type(ours["lr"]) is float


@pytest.mark.parametrize("before, after", [(True, False), (False, True), (True, True)])
def test_a_checkpoint_of_either_goes_on_as_the_other(before, after):
    """Within an epoch of which steps were replayed; each trainer has made steps of its own before."""
    whole = make()
    _, want = train(whole)
    one, other = make(), make()
    for trained, is_recorded in ((one, before), (other, after)):
        if is_recorded:
            recorded(trained)
    train(other, epochs=1)
    train(one, epochs=1)
    shared, own = copy.deepcopy(one.state())
    other.model.load_state_dict(copy.deepcopy(one.model.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    other.load_state(shared, own)
    other.train_epoch("test")
    assert_same(left(other), want, tolerance=0)


def test_a_step_that_is_not_finite_ends_the_run_after_it():
    data = batches(8, bad=[5])
    one = trainer(build("small"), data, opt=SGD, hyper=GROUPS, log_interval=4)
    recorder = recorded(one)
    with pytest.raises(NonFinite, match=r"^step 6: its loss, .* was seen when the step was over"):
        one.train_epoch("test")
    assert one.progress.steps == 8 and recorder.replayed == 5


class Asks(nn.Module):
    """A network whose way depends on a value."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x) if x.sum() > -1e9 else x


def test_a_step_that_cannot_be_recorded_is_made_and_said(caplog):
    found = []
    for is_recorded in (False, True):
        one = make()
        one.strategy.model = one.model = Asks(one.model)
        recorder = recorded(one) if is_recorded else None
        found.append(train(one))
    assert found[0][0] == found[1][0]
    assert_same(found[1][1], found[0][1], tolerance=0)
    (line,) = [one.getMessage() for one in caplog.records if "cuda-graph" in one.getMessage()]
    assert line.startswith(
        "warning: --cuda-graph is left out: a step cannot be recorded (not while it is recorded: _lo"
    )
    assert recorder.replayed == 0


def compiled(one):
    one.model.conv1.compile(backend="eager")


def checkpointed(one):
    one.model.grad_checkpointing = True


def without_momentum(one):
    one.model.bn1.momentum = None


def averaged_elsewhere(one):
    one.ema = ModelEmaV3(one.model, dtype=torch.bfloat16)


def drawing_elsewhere(one):
    one.strategy.generator = SimpleNamespace(device=torch.device("cuda"))


def with_processes(one):
    one.accelerator = SimpleNamespace(**PLAIN | {"num_processes": 2})


def with_a_scaler(one):
    one.accelerator = SimpleNamespace(**PLAIN | {"scaler": object()})


PLAIN = {"device": torch.device("cpu"), "num_processes": 1, "scaler": None, "gradient_accumulation_steps": 1}
OBSTACLES = {
    "2 processes share": with_processes,
    "float16's gradient scaler": with_a_scaler,
    "--torchcompile": compiled,
    "--grad-checkpointing": checkpointed,
    "a BatchNorm layer without momentum": without_momentum,
    "the average of the weights": averaged_elsewhere,
    "the second pass draws its random numbers on cuda": drawing_elsewhere,
    "--grad-accum-steps 2": {"accumulated": 2},
    "--on-nonfinite skip": {"skip_nonfinite": True},
    "--log-interval 1": {"log_interval": 1},
    "the optimizer Adagrad": {"opt": torch.optim.Adagrad},
    "the optimizer Lamb": {"opt": Lamb},
    "the optimizer Lookahead": {"opt": lambda parameters, lr: Lookahead(torch.optim.AdamW(parameters, lr=lr))},
}


@pytest.mark.parametrize("said", OBSTACLES)
def test_what_cannot_be_recorded_is_named(said):
    change = OBSTACLES[said]
    one = trainer(build("small"), batches(1), **(change if isinstance(change, dict) else {}))
    if callable(change):
        change(one)
    on_cpu, other = obstacles(one)
    assert on_cpu == "it trains on cpu, which has no such graphs" and other.startswith(said)


def test_what_is_recorded_holds_numbers_and_tensors():
    """Of the recorder itself: else the tests above could not fail."""
    recorder, place, number = RecordedOperations(), torch.zeros(2), 1

    def call():
        place.add_(number)
        return (place * 2, torch.rand(2))

    replay = recorder.record(call)
    assert not place.any()
    number = 5
    first, drawn = (t.clone() for t in replay())
    again, other = replay()
    assert first.tolist() == [2, 2] and again.tolist() == [4, 4] and place.tolist() == [2, 2]
    assert not torch.equal(drawn, other)
    with pytest.raises(RuntimeError, match="numbers of the host"):
        recorder.record(lambda: (torch.tensor([1.0]),))
