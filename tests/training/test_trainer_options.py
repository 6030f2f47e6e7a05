"""What the trainer adds around a strategy: accumulation, every k-th step, averaging, compilation, augmentation."""

import copy
import shutil

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf import ApartError, create_strategy
from apart_hf.config.train_config import TrainConfig
from apart_hf.data.transforms import data_config, train_transform
from apart_hf.runs.accelerator import make_accelerator
from apart_hf.training.trainer import Trainer
from tests.reference import reference_step
from tests.support.helpers import assert_same, batch, build, gradients

# four samples a group: with two, gradients of networks this small explode
HYPER = {"apart": {"groups": 2}, "sam": {"rho": 0.1}, "apart-sam": {"groups": 2, "rho": 0.2}}


def trainer(model, method, rows, batch_size, accumulated=1, lr=1e-4, every=1, **more):
    """Over `rows` images in order, by plain SGD in small steps: rounding grows exponentially in large ones."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    images, labels = batch(rows)
    loader = torch.utils.data.DataLoader(list(zip(images, labels.tolist())), batch_size=batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    strategy = create_strategy(method, model, accelerator=accelerator, every=every, **HYPER.get(method, {}))
    return Trainer(accelerator, model, strategy, optimizer, None, cross_entropy, loader, loader, **more)


def reference_run(model, method_of_step, rows, batch_size, accumulated, lr=1e-4):
    """The same by the oracle; method_of_step(step, counted from 1) names the method."""
    model = copy.deepcopy(model)
    images, labels = (part.split(batch_size) for part in batch(rows))
    parts = list(zip(images, labels))
    for step, start in enumerate(range(0, len(parts), accumulated), start=1):
        method, group = method_of_step(step), parts[start : start + accumulated]
        found = [reference_step(model, x, y, cross_entropy, method, **HYPER.get(method, {}))[0] for x, y in group]
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= lr * sum(g[name] for g in found) / len(group)
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("method", ["standard", "apart", "sam", "apart-sam"])
def test_accumulation_is_the_mean_over_its_batches(method):
    """Five batches, two a step: the last step has one batch, with its full weight."""
    model = build("test_byobnet")
    want = reference_run(model, lambda _: method, 40, 8, 2)
    one = trainer(model, method, 40, 8, 2)
    one.train_epoch("test")
    assert one.progress.steps == 3
    assert_same(dict(model.named_parameters()), want, tolerance=1e-10)


@pytest.mark.parametrize("method", ["apart", "sam"])
def test_every_third_step_has_a_second_pass(method):
    model, passes = build("test_byobnet"), []
    want = reference_run(model, lambda step: "standard" if step % 3 else method, 32, 8, 1)
    one = trainer(model, method, 32, 8, every=3)
    model.register_forward_hook(lambda *_: passes.append(1))
    one.train_epoch("test")
    assert len(passes) == 5
    assert_same(dict(model.named_parameters()), want, tolerance=1e-10)


@pytest.mark.parametrize("method", ["apart", "sam"])
@pytest.mark.parametrize("every", [1, 3])
def test_the_first_epochs_are_plain(method, every):
    """Three epochs of two steps, each of two batches; `every` counts all steps."""
    model, passes = build("test_byobnet"), []
    want = copy.deepcopy(model)
    for epoch in range(3):
        perturbs = lambda step, epoch=epoch: epoch == 2 and not (2 * epoch + step) % every  # noqa: E731
        found = reference_run(want, lambda step: method if perturbs(step) else "standard", 32, 8, 2)  # noqa: B023
        want.load_state_dict(dict(want.state_dict()) | found)
    one = trainer(model, method, 32, 8, 2, every=every, perturb_from_epoch=3)
    model.register_forward_hook(lambda module, *_: passes.append(one.progress.epoch) if module.training else None)
    list(one.fit(3))
    assert [passes.count(epoch) for epoch in range(3)] == [4, 4, 8 if every == 1 else 6]
    assert_same(dict(model.named_parameters()), dict(want.named_parameters()), tolerance=1e-10)


def test_hyper_parameters_by_a_schedule():
    """The oracle with each step's own epsilon; steps are counted as the optimizer makes them."""
    model, (images, labels) = build("test_byobnet"), (part.split(8) for part in batch(32))
    schedule = lambda steps: {"epsilon": 0.1 * steps}  # noqa: E731
    want = copy.deepcopy(model)
    for step in range(2):
        for x, y in list(zip(images, labels))[2 * step : 2 * step + 2]:
            found = reference_step(model, x, y, cross_entropy, "apart", epsilon=0.1 * step, groups=2)[0]
            with torch.no_grad():
                for name, p in want.named_parameters():
                    p -= 1e-4 * found[name] / 2
        model.load_state_dict(dict(model.state_dict()) | dict(want.named_parameters()))
    model = build("test_byobnet")
    one = trainer(model, "apart", 32, 8, 2, hyper_schedule=schedule)
    one.train_epoch("test")
    assert one.progress.steps == 2 and one.strategy.hyper["epsilon"] == 0.1
    assert_same(dict(model.named_parameters()), dict(want.named_parameters()), tolerance=1e-10)


def test_the_average_of_the_weights_is_what_is_evaluated():
    model = build("test_byobnet")
    ema = ModelEmaV3(model, decay=0.5)
    one = trainer(model, "apart", 16, 8, ema=ema, lr=1.0)
    model.train()
    seen = []
    for images, labels in one.train_loader:
        one.train_step(images, labels)
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
    # timm starts the average from the weights after the first step
    assert_same(dict(ema.module.named_parameters()), {n: (p + seen[1][n]) / 2 for n, p in seen[0].items()}, 1e-12)
    assert list(ema.module.state_dict()) == list(model.state_dict())
    found = one.evaluate(one.val_loader)
    images, labels = batch(16)
    with torch.no_grad():
        assert found.eval_loss == pytest.approx(cross_entropy(ema.module.eval()(images), labels).item())
        assert found.eval_loss != pytest.approx(cross_entropy(model.eval()(images), labels).item())


@pytest.mark.skipif(torch.__version__ < (2, 14), reason="torch 2.6 compiles the passes anew at every call")
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(torch.contiguous_format, marks=pytest.mark.slow, id="nchw"),
        pytest.param(torch.channels_last, id="channels_last"),
    ],
)
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler"),
            ],
        ),
    ],
)
def test_compiled(backend, layout):
    """fullgraph: a graph break would raise. One graph a pass, and the gradients of the uncompiled model."""
    model = build("test_byobnet", dtype=torch.float32).to(memory_format=layout)
    eager, (images, targets) = copy.deepcopy(model), batch(8, dtype=torch.float32)
    images = images.contiguous(memory_format=layout)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    strategies = [
        create_strategy("apart-sam", m, groups=2, rho=0.1)
        for m in (torch.compile(model, fullgraph=True, backend=backend), eager)
    ]
    for _ in range(3):
        for one in (model, eager):
            one.zero_grad()
        for strategy in strategies:
            strategy.accumulate_gradients(images, targets, cross_entropy)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()
    deltas = [s.perturbations[0]._deltas for s in strategies]
    assert torch.equal(*deltas)
    assert_same(gradients(model), gradients(eager), tolerance=1e-4)
    buffers = [{n: b.float() for n, b in m.named_buffers()} for m in (model, eager)]
    assert_same(*buffers, tolerance=1e-5)


def test_dropout_draws_anew_in_the_second_pass():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.drop, self.fc, self.masks = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Linear(3, 5), []

        def forward(self, x):
            self.masks.append(self.drop(torch.ones(len(x), 50)) > 0)
            return self.fc(self.drop(self.bn(x).square().mean((2, 3))))

    model = Dropped()
    create_strategy("apart", model, groups=2).accumulate_gradients(*batch(8, 8, dtype=torch.float32), cross_entropy)
    assert not torch.equal(*model.masks)


@pytest.mark.parametrize("dtype, least, opposite", [(torch.bfloat16, 0.98, 0.08), (torch.float16, 0.999, 0.015)])
def test_autocast_comes_close_to_float64(dtype, least, opposite):
    """The direction of the whole gradient under one and the same attack, and the attack itself."""
    found, attacks = [], []
    for precise in (True, False):
        model = build("test_byobnet", dtype=torch.float64 if precise else torch.float32)
        images, targets = batch(16, 96, dtype=torch.float64 if precise else torch.float32)
        autocast = None if precise else (lambda: torch.autocast("cpu", dtype))
        strategy = create_strategy("apart", model, groups=2, autocast=autocast)
        (statistics,) = strategy.perturbations
        ascend = statistics.ascend

        def ascend_and_compare(generator, statistics=statistics, ascend=ascend):
            ascend(generator)
            attacks.append(statistics._deltas.clone())
            statistics._deltas.copy_(attacks[0])

        statistics.ascend = ascend_and_compare
        strategy.accumulate_gradients(images, targets, cross_entropy)
        found.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
    assert torch.cosine_similarity(*found, dim=0) > least
    exact, rounded = (a.double().sign() for a in attacks)
    assert (exact * rounded < 0).double().mean() < opposite


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_mixed_images_and_targets_are_drawn_once(mixup):
    model, seen, targets_seen = build("test_byobnet"), [], []
    one = trainer(model, "apart", 8, 8, mixup=timm.data.Mixup(mixup, 1.0, num_classes=5, label_smoothing=0.1))
    model.register_forward_hook(lambda _, args, out: seen.append(args[0].clone()))

    def criterion(output, targets):
        targets_seen.append(targets.clone())
        return cross_entropy(output, targets)

    one.criterion = criterion
    one.train_epoch("test")
    assert torch.equal(*seen) and torch.equal(*targets_seen)
    assert not torch.equal(seen[0], batch(8)[0]) and targets_seen[0].shape == (8, 5)


def test_augmentations_of_timm():
    from PIL import Image

    image = Image.new("RGB", (32, 32), (200, 100, 50))
    images = data_config(timm.get_pretrained_cfg("resnet18").to_dict(), (32, 32))
    torch.manual_seed(0)
    plain = train_transform(images, (32, 32), 0)(image)
    assert all(len(channel.unique()) == 1 for channel in plain)  # one colour
    erased = train_transform(images, (32, 32), 0, reprob=1.0)(image)
    kept = [(channel == before[0, 0]).sum() for channel, before in zip(erased, plain)]
    assert kept[0] == kept[1] == kept[2] < 32 * 32
    assert all(len(channel.unique()) == 32 * 32 - n + 1 for channel, n in zip(erased, kept))  # a rectangle of noise
    jittered = [train_transform(images, (32, 32), 0, color_jitter=0.4)(image) for _ in range(4)]
    assert not torch.equal(jittered[0], jittered[1])
    varied = [train_transform(images, (32, 32), 0, aa="rand-m9-mstd0.5")(image) for _ in range(8)]
    assert any(not torch.equal(v, plain) for v in varied) and all(v.shape == plain.shape for v in varied)
    with pytest.raises(ApartError, match="--aa 'random' is no policy"):
        train_transform(images, (32, 32), aa="random")


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_sharded_training_is_refused(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ApartError, match=f"{name} shards weights"):
        make_accelerator(TrainConfig())
