"""The trainer's steps and its evaluation, seen from inside the model."""

import pytest
import timm
import torch
from accelerate import Accelerator
from torch import nn

from apart_hf import create_strategy
from apart_hf.training.metrics import TopKAccuracy
from apart_hf.training.trainer import Trainer
from tests.support.helpers import batch


class Recorder(nn.Module):
    """Keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.bn, self.fc, self.seen = nn.BatchNorm2d(3), nn.Linear(3, 5), []

    def forward(self, x):
        self.seen.append(x.clone())
        return self.fc(self.bn(x).square().mean((2, 3)))


def trainer(model, *, method="apart", rows=10, batch_size=4, **more):
    accelerator = Accelerator(cpu=True)
    images, labels = batch(rows, 8, dtype=torch.float32)
    loader = torch.utils.data.DataLoader(list(zip(images, labels.tolist())), batch_size=batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    hyper = {"groups": 2} if method == "apart" else {}
    strategy = create_strategy(method, model, accelerator=accelerator, **hyper)
    return Trainer(accelerator, model, strategy, optimizer, None, nn.CrossEntropyLoss(), loader, loader, **more)


def test_both_passes_see_the_same_mixed_images():
    model = Recorder()
    one = trainer(model, mixup=timm.data.Mixup(mixup_alpha=1.0, num_classes=5, label_smoothing=0.1), rows=8)
    one.train_epoch("test")
    assert len(model.seen) == 4
    assert torch.equal(model.seen[0], model.seen[1]) and torch.equal(model.seen[2], model.seen[3])
    assert not torch.equal(model.seen[0], batch(8, 8, dtype=torch.float32)[0][:4])  # they were mixed


def test_clipping_happens_once_on_the_combined_gradient():
    torch.manual_seed(0)
    model = Recorder()
    one = trainer(model, clip_grad=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    model.train()
    one.train_step(*batch(4, 8, dtype=torch.float32))
    moved = torch.sqrt(sum((p - q).square().sum() for p, q in zip(model.parameters(), before)))
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_evaluation_counts_every_image_once():
    torch.manual_seed(0)
    model = Recorder()
    one = trainer(model, rows=10)  # batches of 4, 4 and 2
    images, labels = batch(10, 8, dtype=torch.float32)
    found = one.evaluate(one.val_loader)
    with torch.no_grad():
        output = model.eval()(images)
    assert found.eval_loss == pytest.approx(nn.functional.cross_entropy(output, labels).item(), rel=1e-6)
    assert found.top1 == pytest.approx(100 * (output.argmax(1) == labels).float().mean().item())
    assert found.top5 == 100


def test_the_metric():
    metric = TopKAccuracy()
    metric.add_batch(predictions=[[1, 2, 3, 4, 5], [0, 1, 2, 3, 4]], references=[1, 4])
    metric.add_batch(predictions=[[1, 2, 3, 4, 5], [7, 1, 2, 3, 4]], references=[9, 7])
    assert metric.compute() == {"top1": 50.0, "top5": 75.0}
