"""What is computed on a GPU against the oracle on the CPU; the same tests run on the CPU, where there is no GPU."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import convert_sync_batchnorm
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from apart_hf import create_strategy, load_pretrained
from apart_hf.config.train_config import TrainConfig
from apart_hf.data.dataset_memory import InMemoryImages
from apart_hf.runs.train import train
from tests.reference import reference_step
from tests.support.helpers import assert_same, batch, build, gradients
from tests.support.oracle import HYPER

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
KINDS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(params=["cpu", GPU])
def device(request, monkeypatch):
    return chosen(request, monkeypatch)


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), GPU])
def fast_device(request, monkeypatch):
    """Where the CPU takes a minute."""
    return chosen(request, monkeypatch)


def chosen(request, monkeypatch):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU: torch.cuda.is_available() is False")
    if request.param == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return torch.device(request.param)


def on_cpu(tensors):
    return {name: None if tensor is None else tensor.cpu() for name, tensor in tensors.items()}


def placed(model, images, targets, device, layout=torch.contiguous_format):
    model = model.to(device, memory_format=layout)
    return model, images.to(device).contiguous(memory_format=layout), targets.to(device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["standard", *HYPER])
def test_every_method_agrees_with_the_oracle(method, layout, device):
    """In float64: gradients, running statistics, loss."""
    model, (images, targets) = build("test_efficientnet"), batch()
    hyper = HYPER.get(method, {})
    drawn = [torch.Generator().manual_seed(7) for _ in range(2)]
    want, buffers, _ = reference_step(model, images, targets, cross_entropy, method, generator=drawn[0], **hyper)
    with torch.no_grad():
        loss = cross_entropy(copy.deepcopy(model)(images), targets)
    model, *data = placed(model, images, targets, device, LAYOUTS[layout])
    strategy = create_strategy(method, model, generator=drawn[1], **hyper)
    found, _ = strategy.accumulate_gradients(*data, cross_entropy)
    assert_same(on_cpu(gradients(model)), want, tolerance=1e-9)
    own = {name: buffer.double() for name, buffer in on_cpu(dict(model.named_buffers())).items()}
    assert_same(own, {name: buffer.double() for name, buffer in buffers.items()}, tolerance=1e-9)
    assert found.item() == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.parametrize("method", ["apart", "apart-sam"])
def test_a_compiled_model_agrees_with_the_oracle(method, fast_device):
    """On the CPU without inductor, which takes minutes there."""
    device = fast_device
    model, (images, targets) = build("test_byobnet"), batch()
    want, _, _ = reference_step(model, images, targets, cross_entropy, method, **HYPER[method])
    model, *data = placed(model, images, targets, device)
    compiled = torch.compile(model, backend="inductor" if device.type == "cuda" else "aot_eager")
    create_strategy(method, compiled, **HYPER[method]).accumulate_gradients(*data, cross_entropy)
    assert_same(on_cpu(gradients(model)), want, tolerance=1e-8)
    torch._dynamo.reset()


def distance(found, want):
    """The relative error of a whole gradient."""
    difference = sum(float((found[name].double() - want[name]).square().sum()) for name in want)
    return (difference / sum(float(one.square().sum()) for one in want.values())) ** 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["standard", "apart", "apart-sam"])
def test_16_bits_and_a_scaler_stay_near_the_oracle(method, kind, layout, device):
    """The gradient of both passes, unscaled at the end, of a network in which rounding does not grow."""
    model, (images, targets) = build("small"), batch(32)
    want, _, _ = reference_step(model, images, targets, cross_entropy, method, **HYPER.get(method, {}))
    model, images, targets = placed(model.float(), images.float(), targets, device, LAYOUTS[layout])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, enabled=kind == "float16")
    strategy = create_strategy(
        method, model, autocast=lambda: torch.autocast(device.type, KINDS[kind]), **HYPER.get(method, {})
    )
    strategy.accumulate_gradients(images, targets, cross_entropy, backward=lambda loss: scaler.scale(loss).backward())
    scaler.unscale_(optimizer)
    assert distance(on_cpu(gradients(model)), want) < 0.03  # 0.011 was seen
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("method", ["standard", "apart", "apart-sam"])
def test_a_scale_that_overflows_leaves_the_step_out(method, device):
    model, images, targets = placed(build("test_byobnet").float(), *batch(8, dtype=torch.float32), device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**127)
    strategy, before = create_strategy(method, model, **HYPER.get(method, {})), copy.deepcopy(model.state_dict())
    strategy.accumulate_gradients(
        images, targets, cross_entropy, backward=lambda loss: scaler.scale(loss * 1e3).backward()
    )
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_from_memory_are_those_of_the_cpu(channels, device):
    """Crops and flips are drawn alike; float32 rounds alike but for a unit in the last place."""
    rng = np.random.default_rng(0)
    decoded = torch.zeros(40, 12, 12, 4 if channels == 3 else 1, dtype=torch.uint8)
    decoded[..., :channels] = torch.from_numpy(rng.integers(0, 256, (40, 12, 12, channels), dtype=np.uint8))
    shown = {"mean": (0.4,) * channels, "std": (0.3,) * channels, "padding": 2, "flip": True, "vflip": 0.5, "seed": 3}
    labels = rng.integers(10, size=40)
    here, there = (InMemoryImages(decoded, labels, device=one, **shown) for one in ("cpu", device))
    for epoch in (0, 1):
        here.set_epoch(epoch)
        there.set_epoch(epoch)
        (images, targets), (found, own) = (one.__getitems__([5, 0, 39, 7]) for one in (here, there))
        assert found.device.type == device.type and torch.equal(own.cpu(), targets)
        torch.testing.assert_close(found.cpu(), images, rtol=1e-6, atol=1e-6)
        plain = (decoded[5, ..., :channels].float() / 255 - 0.4) / 0.3
        assert float(found[0].max()) <= float(plain.max()) + 1e-5  # these images, cropped from a black border


def synchronised(rank, ranks, device, folder):
    torch.set_num_threads(1)
    here = torch.device(device, rank) if device == "cuda" else torch.device(device)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    try:
        model = convert_sync_batchnorm(build("test_efficientnet")).to(here)
        images, targets = (part.chunk(ranks)[rank].to(here) for part in batch(16))
        wrapped = DistributedDataParallel(model) if device == "cuda" else model  # which refuses it on the CPU
        create_strategy("apart", wrapped, **HYPER["apart"]).accumulate_gradients(images, targets, cross_entropy)
        if device == "cpu":
            for p in model.parameters():
                dist.all_reduce(p.grad)
                p.grad /= ranks
        found = {"gradients": on_cpu(gradients(model)), "buffers": on_cpu(dict(model.named_buffers()))}
        torch.save(found, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.process
def test_synchronised_batchnorm_is_one_process_on_the_joint_batch(fast_device, tmp_path):
    """On as many GPUs as there are, at most two: of one it shows that the layers are taken, and no more."""
    device = fast_device
    ranks = min(2, torch.cuda.device_count()) if device.type == "cuda" else 2
    mp.start_processes(synchronised, (ranks, device.type, tmp_path), nprocs=ranks, start_method="spawn")
    want, buffers, _ = reference_step(build("test_efficientnet"), *batch(16), cross_entropy, "apart", **HYPER["apart"])
    for rank in range(ranks):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert_same(found["gradients"], want, tolerance=1e-9)
        own = {name: buffer.double() for name, buffer in found["buffers"].items()}
        assert_same(own, {name: buffer.double() for name, buffer in buffers.items()}, tolerance=1e-9)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Packed images of 32 pixels in four classes, which noise around four colours tells.

    Of smaller ones the last maps have one pixel: there torch 2.14's bfloat16 convolutions read memory on the CPU that
    nobody has written, and their gradients may not be finite.
    """
    folder, rng = tmp_path_factory.mktemp("colours") / "packed", np.random.default_rng(0)
    centres = rng.integers(40, 215, (4, 3))
    for split, count in (("train", 192), ("test", 64)):
        (folder / split).mkdir(parents=True)
        labels = np.arange(count) % 4
        images = centres[labels][:, None, None] + rng.normal(0, 60, (count, 32, 32, 3))
        np.save(folder / split / "images-0.npy", images.clip(0, 255).astype(np.uint8))
        np.save(folder / split / "labels.npy", labels)
    (folder / "classes.txt").write_text("a\nb\nc\nd\n")
    return folder


RUNS = {
    "float32": ({}, 1e-3),
    "bfloat16, channels_last": ({"amp_dtype": "bfloat16", "channels_last": True}, 0.1),
    "float16": ({"amp_dtype": "float16"}, 0.05),
    "graphs": ({"cuda_graph": True, "log_interval": 4}, 1e-3),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_trains_goes_on_and_says_what_its_export_is(kind, device, colours, tmp_path):
    """The export is measured on the CPU, in float32."""
    more, tolerance = RUNS[kind]
    if kind == "float16" and device.type == "cpu":
        pytest.skip("accelerate has no gradient scaler on the CPU")
    if kind == "graphs" and device.type == "cpu":
        pytest.skip("the CPU has no graphs of operations; tests/training/test_step_graph.py has a stand-in")
    places = {"data_dir": str(colours), "output": str(tmp_path), "experiment": "run", "device": device.type}
    shared = {"model": "test_resnet", "batch_size": 32, "groups": 4, "lr": 0.05, "epochs": 4, "sched": "none", **more}
    train(TrainConfig(**shared, **places, max_steps=8))
    run = train(TrainConfig(**shared, **places, resume="auto", override=True))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    assert last["epoch"] == 4 and last["train_loss"] < lines[0]["train_loss"] and last["top1"] > 80
    model, _ = load_pretrained(str(run))
    config = model.pretrained_cfg
    pixels = torch.from_numpy(np.load(colours / "test/images-0.npy")).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    labels = torch.from_numpy(np.load(colours / "test/labels.npy"))
    with torch.no_grad():
        loss = cross_entropy(model((pixels - mean) / std), labels).item()
    assert loss == pytest.approx(last["eval_loss"], rel=tolerance, abs=tolerance)
