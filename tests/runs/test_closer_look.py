"""What is said of the last evaluation, class by class and of the worst mistakes, is what the exported network says."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image as PIL

from apart_hf import load_pretrained
from apart_hf.runs import closer_look, report
from apart_hf.runs.contact_sheet import pixels
from apart_hf.runs.history import History
from apart_hf.runs.interruption import Interrupted, StopRequest
from apart_hf.runs.run import Run
from apart_hf.runs.train import train
from apart_hf.training.epoch_metrics import EpochMetrics, Evaluation, TrainedEpoch
from apart_hf.training.predictions import SHOWN
from tests.support.helpers import demo_rows
from tests.support.images import png, write_bad
from tests.support.settings import settings

LOADERS = {
    "memory": {"loader": "memory"},
    "workers": {"loader": "workers"},
    "two workers": {"loader": "workers", "workers": 2},
    "stream": {"streaming": True, "train_num_samples": 72},
    "stream, one worker": {"streaming": True, "train_num_samples": 72, "workers": 1},
}
PLOTS = [*closer_look.NUMBERS, *closer_look.PICTURES]


def read(run):
    return [json.loads((run / "plots" / name).read_text()) for name in closer_look.NUMBERS]


def by_the_export(run, images, folder="last"):
    """Probabilities (N, classes) of PIL images, one by one."""
    model, transform = load_pretrained(str(run / folder))
    with torch.no_grad():
        return torch.stack([model(transform(image.convert("RGB"))[None])[0].softmax(0) for image in images]).numpy()


def check(run, images, labels, names, split, epoch):
    """Against a count in plain numpy; images and labels are those that can be decoded, by their row."""
    by_class, confusion, errors = read(run)
    rows = sorted(images)
    probabilities = by_the_export(run, [images[row] for row in rows])
    matrix = np.zeros((len(names), len(names)), dtype=int)
    wrong = []
    for row, found in zip(rows, probabilities):
        matrix[labels[row], found.argmax()] += 1
        if found.argmax() != labels[row]:
            wrong.append((row, names[labels[row]], names[found.argmax()], found.max()))
    for one in (by_class, confusion, errors):
        assert (one["split"], one["epoch"], one["images"]) == (split, epoch, len(rows))
        assert one["errors"] == len(wrong) and one["top1"] == pytest.approx(100 - 100 * len(wrong) / len(rows))
    assert confusion["classes"] == names and confusion["matrix"] == matrix.tolist() and matrix.sum() == len(rows)
    for number, one in enumerate(by_class["classes"]):
        images_of, correct = matrix[number].sum(), matrix[number, number]
        assert (one["class"], one["images"], one["correct"]) == (names[number], images_of, correct)
        assert one["accuracy"] == (pytest.approx(100 * correct / images_of) if images_of else None)
    off = matrix - np.diag(np.diag(matrix))
    pairs = {(one["class"], one["predicted"]): one["images"] for one in by_class["confused"]}
    assert (
        pairs == {(names[i], names[j]): off[i, j] for i, j in zip(*np.nonzero(off))}
        or sorted(pairs.values()) == sorted(off.flatten())[-20:]
    )
    wrong.sort(key=lambda one: -one[3])
    shown = errors["most_confident"]
    assert len(shown) == min(SHOWN, len(wrong))
    assert [one["confidence"] for one in shown] == pytest.approx([one[3] for one in wrong[:SHOWN]], abs=1e-5)
    known = {row: rest for row, *rest in wrong}
    for one in shown:
        truth, guess, confidence = known[one["index"]]
        assert (one["class"], one["predicted"]) == (truth, guess) and one["confidence"] == pytest.approx(
            confidence, 1e-4
        )
    return errors


@pytest.mark.parametrize("loader", LOADERS)
def test_numbers_are_those_of_the_exported_network(loader, little, tmp_path):
    run = train(settings(little, tmp_path, epochs=1, **LOADERS[loader]))
    rows = demo_rows("test").select(range(30))
    names, labels = rows.features["label"].names, rows["label"]
    line = json.loads((run / "metrics.jsonl").read_text())
    if loader == "stream, one worker":  # where an image stands is not known
        shown = read(run)[2]["most_confident"]
        assert shown and all(one.keys() == {"class", "predicted", "confidence"} for one in shown)
        assert read(run)[0]["top1"] == pytest.approx(line["top1"])
        return
    errors = check(run, dict(enumerate(rows["image"])), labels, names, "test", 1)
    assert errors["top1"] == pytest.approx(line["top1"])
    index = errors["most_confident"][0]["index"]
    assert errors["most_confident"][0]["image"] == f"image {index} of split 'test' (row {index}, column 'image')"
    assert errors["most_confident"][0]["file"] is None


@pytest.mark.parametrize("loader", ["memory", "workers", "two workers", "stream"])
def test_images_that_are_passed_over_are_no_errors_and_move_no_others(loader, tmp_path):
    """The class of each image is its row."""
    more = LOADERS[loader] | ({"train_num_samples": 40} if loader == "stream" else {})
    data = write_bad(tmp_path / "data", rows=40)
    run = train(settings(data, tmp_path, epochs=1, on_bad_image="skip", padding=0, img_size=16, **more))
    by_class, confusion, errors = read(run)
    assert errors["images"] == 38 == np.sum(confusion["matrix"])
    assert [i for i, one in enumerate(by_class["classes"]) if one["images"] == 0] == [5, 17]
    assert by_class["classes"][5]["accuracy"] is None
    assert len(errors["most_confident"]) == SHOWN
    for one in errors["most_confident"]:
        assert one["class"] == by_class["classes"][one["index"]]["class"]


@pytest.fixture
def photos(tmp_path):
    """A folder of noise in three classes."""
    seeds = itertools.count()
    for split, count in (("train", 24), ("test", 9)):
        for name in ("cat", "dog", "$emu$_|x"):
            for number in range(count):
                file = tmp_path / "data" / split / name / f"{number} a.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(png(next(seeds)))
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 2])
def test_files_of_a_stream_are_named(workers, photos, tmp_path):
    """Their rows are known, and loader processes share out batches."""
    more = {"streaming": True, "workers": workers, "validation_batch_size": 4}
    run = train(settings(str(photos), tmp_path, epochs=1, **more))
    shown = read(run)[2]["most_confident"]
    found = by_the_export(run, [PIL.open(one["file"]) for one in shown])
    assert shown and [one["confidence"] for one in shown] == pytest.approx(found.max(1), abs=1e-5)
    assert all(one["class"] == one["file"].split("/")[-2] for one in shown)


def test_files_are_named_and_shown(photos, tmp_path, monkeypatch):
    """Of a folder of images, of which a part is held out for validation, and the test split is looked at."""
    seen = []
    monkeypatch.setattr(closer_look, "draw", lambda *given: seen.append(given))
    run = train(settings(str(photos), tmp_path, epochs=2, val_fraction=0.25))
    files = sorted((photos / "test").glob("*/*.png"))
    names = read(run)[1]["classes"]
    ((_, _, mistakes, shown, _),) = seen
    images = {str(file): PIL.open(file) for file in files}
    of_file = dict(zip(images, by_the_export(run, images.values())))
    wrong = {file for file, found in of_file.items() if names[found.argmax()] != file.split("/")[-2]}
    assert {one["file"] for one in shown} == wrong and shown == read(run)[2]["most_confident"]
    transform = load_pretrained(str(run / "last"))[1]
    for one, mistake in zip(shown, mistakes):
        assert one["class"] == one["file"].split("/")[-2] and one["file"] in one["image"]
        assert one["confidence"] == pytest.approx(of_file[one["file"]].max(), abs=1e-5)
        assert torch.equal(mistake.image, transform(images[one["file"]].convert("RGB")))
    assert read(run)[0]["split"] == "test" and read(run)[0]["epoch"] == 2
    results = json.loads((run / "test.json").read_text())["last"]
    assert read(run)[0]["top1"] == pytest.approx(results["top1"])


def test_the_part_that_is_held_out_is_named_by_its_rows(little, tmp_path):
    """Without a test split; rows are those of the split that it is a part of."""
    shutil.copytree(little, tmp_path / "data")
    (tmp_path / "data/test.parquet").unlink()
    run = train(settings(str(tmp_path / "data"), tmp_path, epochs=1, val_fraction=0.25))
    rows = demo_rows("train").select(range(72))
    by_class, _, errors = read(run)
    assert by_class["split"] == "train (0.25 of it, for validation)" and errors["images"] == 18
    claim = json.loads((run / "last/config.json").read_text())["apart"]["results"]
    assert (claim["split"], claim["epoch"], claim["images"]) == (by_class["split"], 1, 18)
    names = rows.features["label"].names
    assert all(names[rows[one["index"]]["label"]] == one["class"] for one in errors["most_confident"])


def test_the_averaged_network_is_looked_at(little, tmp_path):
    run = train(settings(little, tmp_path, model_ema=True, model_ema_decay=0.5))
    rows = demo_rows("test").select(range(30))
    check(run, dict(enumerate(rows["image"])), rows["label"], rows.features["label"].names, "test", 2)


def test_what_an_earlier_end_has_left_goes_with_a_run_that_goes_on(little, tmp_path, monkeypatch, drawn):
    run = train(settings(little, tmp_path, epochs=1, sched="none"))
    assert all((run / "plots" / name).stat().st_size > 100 for name in PLOTS)
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "__bool__", lambda self: True)
        with pytest.raises(Interrupted):
            train(settings(little, tmp_path, epochs=2, sched="none", resume="auto", override=True))
    assert not [name for name in PLOTS if (run / "plots" / name).exists()]
    train(settings(little, tmp_path, epochs=2, sched="none", resume="auto"))
    assert read(run)[0]["epoch"] == 2 and all((run / "plots" / name).exists() for name in PLOTS)


def test_only_the_last_evaluation_is_looked_at(little, tmp_path, monkeypatch):
    kept, record = [], Run._record
    monkeypatch.setattr(
        Run,
        "_record",
        lambda self, last: kept.append(self.history.latest.evaluation.predictions) or record(self, last=last),
    )
    train(settings(little, tmp_path, epochs=3))
    assert [one is None for one in kept] == [True, True, False]


def test_pixels_are_those_before_they_were_normalised():
    image = np.random.default_rng(0).random((4, 6, 3))
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 1.0, 2.0])
    given = torch.from_numpy((image - mean) / std).permute(2, 0, 1)
    assert pixels(given, mean, std) == pytest.approx(image, abs=1e-6)
    grey = pixels(given[:1], mean[:1], std[:1])
    assert grey.shape == (4, 6, 3) and grey[..., 0] == pytest.approx(image[..., 0], abs=1e-6)
    assert (grey[..., 0] == grey[..., 2]).all()


def test_the_curves_have_the_learning_rate_and_the_best_epoch(little, tmp_path, monkeypatch, drawn):
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure) or path.write_bytes(b"x"))
    run = train(settings(little, tmp_path, epochs=4, eval_metric="eval_loss", decay_milestones=[2]))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: (line["eval_loss"], -line["epoch"]))["epoch"]
    loss, accuracy, rate = figures[-1].axes
    for axes, keys in ((loss, ["train_loss", "eval_loss"]), (accuracy, ["train_top1", "top1"]), (rate, ["lr"])):
        *curves, mark = axes.lines
        for curve, key in zip(curves, keys, strict=True):
            assert list(curve.get_xdata()) == [1, 2, 3, 4]
            assert list(curve.get_ydata()) == pytest.approx([line[key] for line in lines])
        assert list(mark.get_xdata()) == [best, best] and mark.get_label() == f"best by eval_loss: epoch {best}"
    assert rate.get_yscale() == "log" and lines[3]["lr"] == pytest.approx(lines[0]["lr"] / 10)


@pytest.mark.parametrize(
    "rates, scale",
    [
        ([0.1, 0.1, 0.01, 0.01], "log"),
        ([0.1, 0.05, 0.01, 1e-6], "linear"),
        ([0.1, 0.1, 0.0], "linear"),
        ([0.1], "linear"),
    ],
)
def test_the_learning_rate_is_drawn_by_factors_where_it_falls_in_steps(rates, scale, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    trained, evaluation = TrainedEpoch(1.0, 50.0, 10.0, 1.0), Evaluation(1.0, 50.0, 90.0)
    epochs = [EpochMetrics(number, trained, evaluation, lr) for number, lr in enumerate(rates, start=1)]
    report.plot_training(History("top1", epochs), tmp_path / "training.png", "title")
    assert figures[0].axes[2].get_yscale() == scale
