"""What is measured of a network when its run ends, against plain versions, and the tests of the study's differences."""

import copy
import math
import statistics
from functools import partial

import numpy as np
import pytest
import torch
from timm.data import resolve_model_data_config
from torch import nn

from apart_hf import ApartError
from apart_hf.data import DataSettings
from apart_hf.paper.comparisons import compare, holm, render_comparisons
from apart_hf.paper.corruptions import CorruptedImages, corrupt, corrupt_images
from apart_hf.paper.measures import calibration_error, measure, normalised, recalibrate
from apart_hf.paper.subset import evaluation_images, reduce_data
from tests.support.helpers import load, randomise_batchnorm


@pytest.fixture(scope="module")
def photos():
    """Smooth coloured images of 32 pixels."""
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 256, size=(40, 2, 2, 3))
    ramp = np.linspace(0, 1, 32)
    across = corners[:, :, :1] * (1 - ramp)[None, None, :, None] + corners[:, :, 1:] * ramp[None, None, :, None]
    return list(
        (across[:, :1] * (1 - ramp)[None, :, None, None] + across[:, 1:] * ramp[None, :, None, None]).astype(np.uint8)
    )


@pytest.fixture(scope="module")
def corrupted(photos):
    return corrupt_images(photos, np.arange(40) % 3, severities=(1, 5), edge=16)


def test_a_corruption_depends_on_its_own_seed_alone(photos, corrupted):
    assert corrupted.images.shape == (15, 2, 40, 16, 16, 3) and len(set(corrupted.names)) == 15
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    for number, name in enumerate(corrupted.names):
        again = corrupt(photos[4], name, 5, seed=(4, number, 5))
        means = again.reshape(16, 2, 16, 2, 3).mean((1, 3))
        assert np.abs(means - corrupted.images[number, 1, 4]).max() <= 1, name  # rounded
    assert np.random.get_state()[1].tolist() == before
    noise = [corrupt(photos[0], "impulse_noise", 3, seed=(seed, 0, 0)) for seed in (0, 1)]
    assert (noise[0] != noise[1]).any()
    plain = np.array([photo.reshape(16, 2, 16, 2, 3).mean((1, 3)) for photo in photos])
    distance = np.abs(corrupted.images - plain).mean((2, 3, 4, 5))
    assert (distance > 0.2).all() and (distance[:, 1] > distance[:, 0]).mean() > 0.8  # severity tells


def test_corrupted_images_are_kept(corrupted, tmp_path):
    corrupted.save(tmp_path / "corrupted.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["corrupted.npz"]
    again = CorruptedImages.load(tmp_path / "corrupted.npz")
    assert again.digest == corrupted.digest and again.names == corrupted.names and again.severities == (1, 5)
    assert [(name, severity) for name, severity, _ in again][:3] == [
        (again.names[0], 1),
        (again.names[0], 5),
        (again.names[1], 1),
    ]
    (tmp_path / "corrupted.npz").write_bytes(b"PK")
    with pytest.raises(ApartError, match=r"corrupted.npz cannot be read .*remove it"):
        CorruptedImages.load(tmp_path / "corrupted.npz")


def test_small_images_are_not_corrupted(photos):
    with pytest.raises(ApartError, match="image 1 has 32x28 pixels; corruptions need at least 32x32"):
        corrupt_images([photos[0], photos[1][:28]], np.zeros(2), severities=(1,))


def test_a_missing_package_is_named(photos, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ApartError, match=r"pip install \"apart-hf\[corruptions\]\""):
        corrupt_images(photos, np.zeros(40), severities=(1,))


def test_originals_of_a_part(tmp_path):
    """An image of the part is the average of the original in the same place."""
    reduce_data(DataSettings(), tmp_path / "part", classes=3, images=50, edge=14)
    part = load(data_dir=str(tmp_path / "part"))
    chosen = [0, 5, len(part.val) // 2, len(part.val) - 1]
    originals, labels = evaluation_images(DataSettings(), classes=3, images=50, chosen=chosen)
    assert labels.tolist() == part.val.labels()[chosen].tolist() and originals[0].shape == (28, 28, 3)
    for original, (cell, _) in zip(originals, part.val.cells(chosen)):
        shown = np.asarray(load_cell(cell), dtype=float)
        assert np.abs(shown - original.reshape(14, 2, 14, 2, 3).mean((1, 3))).max() <= 1


def load_cell(cell):
    from apart_hf.data.decoding import rgb

    return rgb(cell)


def plain_calibration_error(logits, labels, bins):
    total = 0.0
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    for lower in np.arange(bins) / bins:
        inside = (confidence > lower) & (confidence <= lower + 1 / bins)
        if inside.any():
            total += abs((predicted == labels)[inside].mean() - confidence[inside].mean()) * inside.mean()
    return 100 * total


def test_calibration_error():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(500, 4)) * 3, rng.integers(4, size=500)
    found = calibration_error(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found == pytest.approx(plain_calibration_error(logits, labels, 15), abs=1e-9)
    sure = torch.tensor([[100.0, 0.0]] * 4)
    assert calibration_error(sure, torch.tensor([0, 0, 0, 1])) == pytest.approx(25.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network with random BatchNorm, and a part of the demo data in its size."""
    import timm

    folder = tmp_path_factory.mktemp("measures") / "part"
    reduce_data(DataSettings(), folder, classes=3, images=60, edge=16)
    model = randomise_batchnorm(timm.create_model("test_resnet", num_classes=3)).eval()
    model.pretrained_cfg |= {
        "input_size": (3, 16, 16),
        "mean": (0.3, 0.4, 0.5),
        "std": (0.2, 0.3, 0.25),
        "crop_pct": 1.0,
    }
    return model, load(data_dir=str(folder))


def test_measures_are_those_of_a_plain_evaluation(trained, corrupted, tmp_path):
    model, data = trained
    before = copy.deepcopy(model.state_dict())
    found = measure(model, data, corrupted, tmp_path / "logits.npz")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    mean, std = torch.tensor([0.3, 0.4, 0.5]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    with torch.no_grad():
        logits = torch.cat(
            [
                model(((torch.from_numpy(np.array(load_cell(cell))).permute(2, 0, 1) / 255 - mean) / std)[None])
                for cell, _ in data.val.cells(list(range(len(data.val))))
            ]
        )
    labels = torch.from_numpy(np.array(data.val.labels()))
    assert found["images"] == len(labels)
    assert found["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item(), abs=100 / 7000)
    assert found["eval_loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    kept = np.load(tmp_path / "logits.npz")
    assert kept["logits"].dtype == np.float16 and kept["labels"].tolist() == labels.tolist()
    assert np.abs(kept["logits"] - logits.numpy()).max() <= 2e-3 * np.abs(logits.numpy()).max()
    rows = found["statistics"]
    assert {(row["statistic"], row["epsilon"]) for row in rows} == {
        (kind, radius) for kind in ("mean", "std") for radius in (0.1, 0.2, 0.3, 0.4)
    }
    assert len(rows) == 2 * 4 * 3 and all(row["images"] == len(labels) for row in rows)
    assert len(found["corruptions"]) == 30 and found["corrupted_images"] == corrupted.digest


def keep_input(seen, name, layer, inputs):
    seen.setdefault(name, inputs[0].detach())


def test_recalibrated_statistics_are_those_of_the_other_half(trained, corrupted):
    """By a plain version: each layer normalises by its input's own mean and variance, and remembers them."""
    model, data = trained
    config = resolve_model_data_config(model)
    row = next(
        row
        for row in measure(model, data, corrupted)["corruptions"]
        if (row["corruption"], row["severity"]) == ("fog", 5)
    )
    images = corrupted.images[corrupted.names.index("fog"), 1]
    hits = 0
    for estimated, evaluated in ((slice(0, 20), slice(20, 40)), (slice(20, 40), slice(0, 20))):
        network, seen = copy.deepcopy(model), {}
        for name, layer in network.named_modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_pre_hook(partial(keep_input, seen, name))
                layer.training = True
        network(normalised(images[estimated], config))
        for name, layer in network.named_modules():
            if name in seen:
                layer.running_mean.copy_(seen[name].mean((0, 2, 3)))
                layer.running_var.copy_(seen[name].var((0, 2, 3)))
        again = recalibrate(model, normalised(images[estimated], config))
        for (name, own), other in zip(again.state_dict().items(), network.state_dict().values()):
            if "running" in name:
                torch.testing.assert_close(own, other, msg=name)
        assert not any(module.training for module in again.modules())
        with torch.no_grad():
            found = network.eval()(normalised(images[evaluated], config)).argmax(1)
        hits += int((found.numpy() == corrupted.labels[evaluated]).sum())
    assert row["top1_recalibrated"] == pytest.approx(100 * hits / 40)


def test_differences_are_corrected_for_their_number():
    """Holm's procedure by hand; t of 5 degrees of freedom: 2.570582 at 95 %, 4.032143 at 99 %."""
    base = dict(enumerate([60.0, 61.0, 59.5, 60.5, 61.5, 60.2]))
    gains = [1.0, 2.0, 1.5, 0.5, 2.5, 1.1]
    rows = {
        "a": {seed: value + gain for (seed, value), gain in zip(base.items(), gains)},
        "b": base,
        "c": {seed: value + (-1) ** seed for seed, value in base.items()},
        "d": {7: 1.0},
        "e": {seed: value + 1 for seed, value in base.items()},
    }
    first, second, same = compare(rows, [("a", "b"), ("d", "b"), ("c", "b"), ("missing", "b"), ("e", "b")])
    error = statistics.stdev(gains) / math.sqrt(6)
    mean = statistics.fmean(gains)
    assert (first.name, first.seeds) == ("a - b", 6) and first.mean == pytest.approx(mean)
    assert first.interval == pytest.approx((mean - 2.570582 * error, mean + 2.570582 * error), rel=1e-5)
    assert first.wide == pytest.approx((mean - 4.032143 * error, mean + 4.032143 * error), rel=1e-5)
    assert first.holm == pytest.approx(5 * first.p) and second.holm == pytest.approx(min(1, 4 * second.p))
    assert same.mean == pytest.approx(1) and same.p is None and same.interval is None
    assert holm([0.01, 0.04, 0.03], 3) == pytest.approx([0.03, 0.06, 0.06])
    text = render_comparisons([first, same], 5).splitlines()
    assert "99 % interval" in text[0] and "p (Holm, 5 tests)" in text[0]
    assert text[2].startswith(f"| a - b | 6 | {mean:+.2f} | ") and text[3] == "| e - b | 6 | +1.00 |  |  |  |  |"
    assert render_comparisons([], 5) == ""
