"""The most confident mistakes that an evaluation keeps are those of all its predictions, on one process or several."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from apart_hf.data import IGNORED
from apart_hf.training.evaluation import evaluate
from apart_hf.training.predictions import EDGE, MostConfidentMistakes
from tests.support.ranks import RANKS, on_two_ranks, start_rank

CLASSES = 4


class Shown(nn.Module):
    """Its logits are what stands in the first pixels of an image."""

    def forward(self, images):
        return images[:, 0, 0, :CLASSES] * 3


def rows(count=41, ignored=(3, 10)):
    g = torch.Generator().manual_seed(0)
    images, labels = torch.randn(count, 3, 8, 6, generator=g), torch.randint(CLASSES, (count,), generator=g)
    labels[list(ignored)] = IGNORED
    return images, labels


def wanted(images, labels, count):
    """(position, class, predicted, confidence), the most confident first."""
    probabilities = Shown()(images).softmax(1)
    confidence, predicted = probabilities.max(1)
    wrong = [i for i in range(len(labels)) if labels[i] != IGNORED and labels[i] != predicted[i]]
    wrong.sort(key=lambda i: -confidence[i])
    return [(i, labels[i].item(), predicted[i].item(), pytest.approx(confidence[i].item())) for i in wrong[:count]]


def as_rows(mistakes):
    return [(one.position, one.label, one.predicted, one.confidence) for one in mistakes]


@pytest.mark.parametrize("count", [1, 5, 100])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_mistakes_are_the_most_confident_of_all_batches(count, size):
    images, labels = rows()
    accelerator = Accelerator(cpu=True)
    found = evaluate(Shown(), list(zip(images.split(size), labels.split(size))), accelerator, count)
    kept = found.predictions
    assert as_rows(kept.mistakes) == wanted(images, labels, count)
    assert all(torch.equal(one.image, images[one.position]) for one in kept.mistakes)
    seen = labels != IGNORED
    assert kept.labels.tolist() == labels[seen].tolist()
    assert kept.predicted.tolist() == Shown()(images[seen]).argmax(1).tolist()
    assert found.top1 == pytest.approx(100 * (kept.labels == kept.predicted).mean())
    assert evaluate(Shown(), [(images, labels)], accelerator) == found  # and keeps nothing
    assert evaluate(Shown(), [(images, labels)], accelerator).predictions is None


def test_none_is_wrong():
    images, _ = rows()
    found = evaluate(Shown(), [(images, Shown()(images).argmax(1))], Accelerator(cpu=True), 5)
    assert found.predictions.mistakes == [] and found.top1 == 100


def test_large_images_are_kept_small():
    images, labels = torch.rand(3, 3, 2 * EDGE, 4 * EDGE), torch.tensor([0, 1, 2])
    kept = MostConfidentMistakes(3)
    kept.add(images, labels, torch.tensor([3, 3, 3]), torch.rand(3, CLASSES))
    for one in kept.gathered(Accelerator(cpu=True)):
        assert one.image.shape == (3, EDGE // 2, EDGE)
        want = nn.functional.avg_pool2d(images[one.position], 4)
        assert torch.allclose(one.image, want, atol=1e-6)


def rank(number, folder):
    """Each process has every second image; the first one has one more."""
    start_rank(number, folder)
    images, labels = rows()
    own = range(number, len(labels), RANKS)
    found = evaluate(Shown(), list(zip(images[own].split(8), labels[own].split(8))), Accelerator(cpu=True), 9)
    kept = found.predictions
    counted = torch.from_numpy(kept.labels * CLASSES + kept.predicted).bincount(minlength=CLASSES**2)
    torch.save({"counted": counted, "mistakes": as_rows(kept.mistakes), "top1": found.top1}, folder / f"{number}.pt")


@pytest.mark.process
def test_processes_share_their_predictions(tmp_path):
    images, labels = rows()
    seen, predicted = labels != IGNORED, Shown()(images).argmax(1)
    counted = (labels[seen] * CLASSES + predicted[seen]).bincount(minlength=CLASSES**2)
    for found in on_two_ranks(rank, tmp_path):
        assert torch.equal(found["counted"], counted) and found["mistakes"] == wanted(images, labels, 9)
        assert found["top1"] == pytest.approx(100 * (labels[seen] == predicted[seen]).float().mean().item())
