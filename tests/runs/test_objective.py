"""Mixed labels and losses are those of timm's classes, with the settings that they were given."""

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

from apart_hf.config.defaults import fill_defaults
from apart_hf.config.train_config import TrainConfig
from apart_hf.runs.objective import make_criterion, make_mixup

CLASSES = 5


def made(**given):
    config = fill_defaults(TrainConfig(**given))
    mixup = make_mixup(config, CLASSES)
    return mixup, make_criterion(config, mixup)


def batch(size=8):
    g = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 8, 8, generator=g), torch.randint(CLASSES, (size,), generator=g)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_what_is_mixed_is_timm_s(mode):
    given = {"mixup": 0.4, "cutmix": 1.0, "mixup_prob": 0.7, "mixup_switch_prob": 0.3, "smoothing": 0.1}
    ours, _ = made(mixup_mode=mode, **given)
    theirs = Mixup(0.4, 1.0, prob=0.7, switch_prob=0.3, mode=mode, label_smoothing=0.1, num_classes=CLASSES)
    for seed in range(5):
        results = []
        for mixup in (ours, theirs):
            np.random.seed(seed)
            images, labels = batch()
            results.append(mixup(images, labels))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def shares(mixup, count=2000):
    """How many batches were left alone, blended, and cut."""
    np.random.seed(0)
    found = {"alone": 0, "blended": 0, "cut": 0}
    before = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 4, 4)
    for _ in range(count):
        images, _ = mixup(before.clone(), torch.arange(4) % CLASSES)
        whole = bool((images == before).all())
        of_one = bool(((images == before) | (images == before.flip(0))).all())
        found["alone" if whole else "cut" if of_one else "blended"] += 1
    return {kind: number / count for kind, number in found.items()}


def test_probabilities_of_mixing():
    found = shares(made(mixup=0.4, cutmix=1.0, mixup_prob=0.6, mixup_switch_prob=0.25)[0])
    assert found["blended"] == pytest.approx(0.6 * 0.75, abs=0.04)
    assert 0.05 < found["cut"] < 0.6 * 0.25 + 0.04  # a box may be empty, or the whole image
    assert shares(made(mixup=0.4, mixup_prob=0.0)[0], 50) == {"alone": 1.0, "blended": 0.0, "cut": 0.0}


def test_mixing_ends_and_smoothing_stays():
    mixup, criterion = made(mixup=1.0, mixup_off_epoch=2, smoothing=0.1)
    assert isinstance(criterion, torch.nn.CrossEntropyLoss) and criterion.label_smoothing == 0
    for epoch, mixes in [(0, True), (1, True), (2, False), (5, False), (1, True)]:  # one goes back when it is resumed
        mixup.set_epoch(epoch)
        np.random.seed(3)
        images, labels = batch()
        mixed, targets = mixup(images.clone(), labels)
        assert torch.equal(mixed, images) != mixes
        if not mixes:
            assert torch.allclose(targets.max(-1).values, torch.tensor(0.92)) and torch.equal(
                targets.argmax(-1), labels
            )
    forever, _ = made(mixup=1.0)
    forever.set_epoch(10**6)
    assert forever.mixup_enabled


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_of_labels(smoothing):
    mixup, criterion = made(bce_loss=True, smoothing=smoothing)
    output, labels = torch.randn(8, CLASSES), batch()[1]
    assert mixup is None
    assert torch.equal(criterion(output, labels), BinaryCrossEntropy(smoothing)(output, labels))
    off = smoothing / CLASSES
    hot = torch.full((8, CLASSES), off).scatter_(1, labels.view(-1, 1), 1 - smoothing + off)
    want = -(hot * output.sigmoid().log() + (1 - hot) * (-output).sigmoid().log()).mean()
    assert criterion(output, labels).item() == pytest.approx(want.item(), rel=1e-5)
    _, plain = made(smoothing=smoothing)
    want = torch.nn.functional.cross_entropy(output, labels, label_smoothing=smoothing)
    assert torch.equal(plain(output, labels), want)


def test_losses_of_mixed_labels():
    output, targets = torch.randn(8, CLASSES), torch.rand(8, CLASSES).softmax(-1)
    _, criterion = made(bce_loss=True, smoothing=0.2, cutmix=1.0)  # they are smoothed already
    assert torch.equal(criterion(output, targets), BinaryCrossEntropy(0.5)(output, targets))
    _, plain = made(smoothing=0.2, cutmix=1.0)
    assert plain(output, targets).item() == pytest.approx(SoftTargetCrossEntropy()(output, targets).item(), rel=1e-6)
