"""Models with BN mistakes made visible, comparisons, and commands run for real."""

from __future__ import annotations

import copy
import os
import subprocess
from pathlib import Path

import timm
import torch
from accelerate.state import AcceleratorState, GradientState
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import apart_hf  # noqa: F401  registers models
from apart_hf.data import DataSettings, load_image_data
from apart_hf.data.registry import DEMO_DIR
from apart_hf.models import PreActResNet
from apart_hf.strategies.batches import detached

ROOT = Path(__file__).parents[2]
FAST = ["--model", "test_resnet", "--batch-size", "32", "--groups", "4", "--max-steps", "2"]


def load(dataset="demo", data_dir=None, **more):
    return load_image_data(DataSettings(dataset, data_dir=data_dir, **more))


def demo_rows(split):
    """The demo set as `datasets` gives it."""
    import datasets  # which machines with GPUs need not have

    return datasets.load_dataset("parquet", data_files=str(DEMO_DIR / f"{split}.parquet"), split="train")


def write_demo(folder, **rows):
    """The first rows of splits of the demo set as a parquet folder: write_demo(folder, train=64, test=40)."""
    folder.mkdir(exist_ok=True)
    for split, count in rows.items():
        demo_rows(split).select(range(count)).to_parquet(str(folder / f"{split}.parquet"))
    return str(folder)


def forget_accelerator():
    """Accelerate's state, which it keeps for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(*command, cwd="/", **env):
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
    )


def randomise_batchnorm(model, seed=0):
    """Random gamma, beta and running statistics: at their initial values most BN mistakes cannot be seen."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                shape = (layer.num_features,)
                if layer.affine:
                    sign = torch.randint(0, 2, shape, generator=g) * 2 - 1
                    layer.weight.copy_((0.5 + torch.rand(shape, generator=g)) * sign)
                    layer.bias.copy_(0.5 * torch.randn(shape, generator=g))
                if layer.track_running_stats:
                    layer.running_mean.copy_(torch.randn(shape, generator=g))
                    layer.running_var.copy_(0.5 + torch.rand(shape, generator=g))
    return model


def with_batch_statistics(model):
    """A copy that normalises by its batch, and is in eval mode otherwise."""
    network = copy.deepcopy(model).eval()
    for layer in network.modules():
        if isinstance(layer, _BatchNorm):
            layer.training = True
    return network


class BatchNorm1dNet(nn.Module):
    """BN1d on (N, C, L) and on (N, C), one layer without affine parameters, one shared by two calls."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3)
        self.bn1 = nn.BatchNorm1d(8)
        self.fc1 = nn.Linear(8, 8)
        self.shared = nn.BatchNorm1d(8)
        self.fc2 = nn.Linear(8, 8)
        self.plain = nn.BatchNorm1d(8, affine=False)
        self.fc3 = nn.Linear(8, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv(x.flatten(2)))).mean(-1) * 8
        x = torch.relu(self.shared(self.fc1(x)))
        x = torch.relu(self.shared(self.fc2(x)))
        return self.fc3(self.plain(x).square())


class SmallNet(nn.Module):
    """Two convolutions and no structural zeros: rounding does not grow in it, so that 1e-14 can be asked for."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.tanh(self.bn2(self.conv2(x))).mean((2, 3)))


def slim_resnet18(num_classes=5):
    """timm's resnet18 at a quarter of its width: float64 is slow, and width has no part in what is asked."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, channels=(16, 32, 64, 128))


def slim_wide_resnet16(num_classes=5):
    """Our wide_resnet16_2 at half of its width."""
    return PreActResNet((16, 32, 64), blocks=2, stem_width=8, num_classes=num_classes)


class Tokens(nn.Module):
    """BN1d over the tokens of all samples, as in LeViT: dim 0 is samples x rows."""

    def __init__(self):
        super().__init__()
        self.embed, self.bn, self.fc = nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x):
        tokens = self.embed(x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2))
        return self.fc(self.bn(tokens).square().view(len(x), -1, 6).mean(1))


OWN = {
    "bn1d": BatchNorm1dNet,
    "small": SmallNet,
    "slim_resnet18": slim_resnet18,
    "slim_wide_resnet16": slim_wide_resnet16,
    "tokens": lambda num_classes: Tokens(),
}


def build(name, *, num_classes=5, dtype=torch.float64, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = OWN[name](num_classes) if name in OWN else timm.create_model(name, num_classes=num_classes, **kwargs)
    return randomise_batchnorm(model, seed).to(dtype).train()


def batch(size=16, pixels=32, *, num_classes=5, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, pixels, pixels, generator=g, dtype=torch.float64).to(dtype) + 0.3
    return images, torch.randint(num_classes, (size,), generator=g)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(actual, expected, tolerance=1e-10):
    """Each tensor agrees to `tolerance` of its own largest entry (a tensor that is zero but for rounding: of all).

    Returns the largest difference by that measure.
    """
    worst = 0.0
    for name, error, measure in _differences(actual, expected):
        assert error <= tolerance * measure, f"{name}: error {error:.3g}, bound {tolerance * measure:.3g}"
        worst = max(worst, error / measure if measure else 0.0)
    return worst


def difference(actual, expected):
    """The largest difference, by the measure of `assert_same`."""
    return max(error / measure for _, error, measure in _differences(actual, expected) if measure)


def _differences(actual, expected):
    assert actual.keys() == expected.keys()
    actual, expected = detached(actual), detached(expected)
    top = max(float(t.abs().max()) for t in expected.values() if t is not None and t.numel())
    for name, want in expected.items():
        got = actual[name]
        if want is None:
            assert got is None or not got.any(), name
            continue
        assert got is not None and got.shape == want.shape, name
        scale = float(want.abs().max())
        yield name, float((got - want).abs().max()), scale if scale > 1e-12 * top else top


def snapshot(model):
    """Everything that a call must leave as it was: classes, attributes by identity and order, keys."""
    modules = [
        (
            name,
            type(m),
            list(m.__dict__),
            [id(v) for k, v in m.__dict__.items() if k != "_parameters"],
            [(k, id(p)) for k, p in m._parameters.items()],
            [(k, id(b)) for k, b in m._buffers.items()],
        )
        for name, m in model.named_modules()
    ]
    flags = [(m.training, m.track_running_stats) for m in model.modules() if isinstance(m, _BatchNorm)]
    return modules, flags, list(model.state_dict())


# what a pushed run consists of, and its name in the tests
PUSHED = {"model.safetensors", "config.json", "class_map.txt", "README.md", "metrics.jsonl"}
PUSHED |= {"plots/training.png", "plots/classes.json", "plots/confusion.png"}
REPO = "user/demo-test_resnet-apart"


def arrived(hub, repo_id=REPO, **more):
    """Names of the files that were pushed."""
    return {name for name in hub.files(repo_id, **more) if name != ".gitattributes"}
