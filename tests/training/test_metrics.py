"""The metric is the same with and without the package evaluate, and as many packages are named as are installed."""

import sys
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from apart_hf import load_pretrained
from apart_hf.training import metrics
from apart_hf.training.metrics import PlainTopKAccuracy, TopKAccuracy
from apart_hf.utils import environment
from tests.support.helpers import ROOT


@pytest.fixture
def without_datasets(monkeypatch):
    """Neither datasets nor evaluate can be imported."""
    metrics._metric_class.cache_clear()
    for name in ("datasets", "evaluate"):
        monkeypatch.setitem(sys.modules, name, None)
    yield
    metrics._metric_class.cache_clear()


@pytest.mark.parametrize("classes", [3, 20])
def test_both_count_alike(classes, request):
    rng = np.random.default_rng(classes)
    scores, labels = rng.normal(size=(50, classes)), rng.integers(classes, size=50)
    best = np.argsort(-scores, 1)[:, :5]

    def computed(metric):
        for rows in (slice(0, 17), slice(17, 50)):
            metric.add_batch(predictions=best[rows], references=labels[rows])
        return metric.compute()

    metric = TopKAccuracy(keep_in_memory=True)
    assert not isinstance(metric, PlainTopKAccuracy)
    usual = computed(metric)
    request.getfixturevalue("without_datasets")
    metric = TopKAccuracy(keep_in_memory=True)
    assert isinstance(metric, PlainTopKAccuracy)
    found = computed(metric)
    assert found == usual
    rank = (scores > scores[np.arange(50), labels][:, None]).sum(1)
    assert found == {"top1": 100 * (rank < 1).mean(), "top5": pytest.approx(100 * (rank < 5).mean())}


def test_what_is_not_installed_has_no_version(monkeypatch):
    known, version = environment.versions(), environment.version

    def lacking(name):
        if name == "evaluate":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(environment, "version", lacking)
    assert environment.versions() == {name: number for name, number in known.items() if name != "evaluate"}


def test_the_hub_is_asked_without_datasets(hub, without_datasets):
    source = ROOT / "model_cards/demo-test_resnet-apart"
    hub.put("user/bare", {name: (source / name).read_bytes() for name in ("model.safetensors", "config.json")})
    assert load_pretrained("user/bare")[0].num_classes == 10
