"""Numbers by class without a run, and pictures of any number of classes: nothing is cut off."""

import json

import numpy as np
import pytest
from PIL import Image as PIL

from apart_hf.runs import class_plots, contact_sheet
from apart_hf.runs.class_plots import plot_accuracy, plot_confusion
from apart_hf.runs.confusion import Confusion
from apart_hf.runs.contact_sheet import LETTERS, caption, plot_mistakes
from apart_hf.training.predictions import Predictions
from apart_hf.utils.plotting import shortened


def guesses(classes, images=400, missing=()):
    rng = np.random.default_rng(classes)
    labels = rng.choice([i for i in range(classes) if i not in missing], images)
    return Predictions(labels, np.where(rng.random(images) < 0.6, labels, rng.integers(classes, size=images)), [])


def counted(found, classes):
    matrix = np.zeros((classes, classes), dtype=int)
    for truth, guess in zip(found.labels, found.predicted):
        matrix[truth, guess] += 1
    return matrix


@pytest.mark.parametrize("classes", [2, 7, 1000, 1001, 3000])
def test_numbers(classes):
    found, names = guesses(classes, missing=(1,)), [f"class {i}" for i in range(classes)]
    confusion, matrix = Confusion.of(found, names), counted(found, classes)
    assert confusion.images.tolist() == matrix.sum(1).tolist()
    assert confusion.correct.tolist() == matrix.diagonal().tolist()
    assert confusion.top1 == pytest.approx(100 * (found.labels == found.predicted).mean())
    assert (np.isnan(confusion.accuracy) == (matrix.sum(1) == 0)).all() and np.isnan(confusion.accuracy[1])
    written = json.loads(json.dumps(confusion.matrix()))
    if classes <= 1000:
        assert written["matrix"] == matrix.tolist()
    else:
        again = np.zeros_like(matrix)
        for truth, guess, count in written["entries"]:
            again[truth, guess] = count
        assert (again == matrix).all()
    pairs = confusion.confused(5)
    off = matrix - np.diag(matrix.diagonal())
    assert [count for *_, count in pairs] == sorted(off.flatten().tolist(), reverse=True)[: len(pairs)]
    assert all(off[truth, guess] == count for truth, guess, count in pairs)
    assert json.loads(json.dumps(confusion.by_class()))["classes"][1]["accuracy"] is None


def test_blocks_keep_every_image():
    found = guesses(25)
    matrix, blocks = counted(found, 25), Confusion.of(found, ["x"] * 25).blocks(10)
    assert blocks.shape == (9, 9) and blocks.sum() == 400
    assert blocks[2, 5] == matrix[6:9, 15:18].sum() and blocks[8, 8] == matrix[24, 24]


def margins(path):
    """Whether the outermost pixels are white: nothing reaches the edge, so that nothing is cut off."""
    image = np.asarray(PIL.open(path).convert("L"))
    return all((edge == 255).all() for edge in (image[0], image[-1], image[:, 0], image[:, -1])), image


@pytest.mark.parametrize("classes", [1, 2, 21, 61, 1001])
def test_pictures_of_any_number_of_classes(classes, tmp_path):
    names = [["W" * 60, "$\\alpha$_{x", "_hidden", "two\nlines", "猫"][i % 5] + str(i) for i in range(classes)]
    confusion = Confusion.of(guesses(classes, missing=(1,)), names)
    for plot in (plot_confusion, plot_accuracy):
        plot(confusion, tmp_path / "plot.png", f"{'a_long_$name$' * 8}, epoch 1: 400 images")
        whole, image = margins(tmp_path / "plot.png")
        assert whole and image.min() < 50 and max(image.shape) < 4000


def test_cells_have_the_numbers_of_the_matrix(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(class_plots, "save", lambda figure, *_, **__: figures.append(figure))
    found = guesses(5)
    confusion, matrix = Confusion.of(found, list("abcde")), counted(found, 5)
    plot_confusion(confusion, tmp_path, "title")
    axes = figures[0].axes[0]
    cells = {(text.get_position()[1], text.get_position()[0]): int(text.get_text()) for text in axes.texts}
    assert cells == {(i, j): matrix[i, j] for i, j in zip(*np.nonzero(matrix))}
    assert [label.get_text() for label in axes.get_yticklabels()] == list("abcde")
    assert np.asarray(axes.images[0].get_array()) == pytest.approx(100 * matrix / matrix.sum(1, keepdims=True))
    plot_accuracy(confusion, tmp_path, "title")
    widths = [bar.get_width() for bar in figures[1].axes[0].patches]
    assert widths == pytest.approx(sorted(confusion.accuracy))


@pytest.mark.parametrize("count, size", [(1, (28, 28)), (6, (20, 64)), (25, (16, 8))])
def test_a_contact_sheet(count, size, tmp_path):
    rows = [
        {"class": "W" * 50, "predicted": "$x$" * 20, "confidence": 1.0, "file": f"/a/{'y' * 80}{i}.png"}
        for i in range(count)
    ]
    images = [np.full((*size, 3), 0.5)] * count
    plot_mistakes(images, [caption(row) for row in rows], tmp_path / "sheet.png", "title" * 20)
    whole, image = margins(tmp_path / "sheet.png")
    grey = (np.abs(image.astype(int) - 127) <= 1).sum()
    tile = contact_sheet._WIDTH * 120
    assert whole and grey == pytest.approx(count * tile**2 * size[0] / size[1], rel=0.05)


def test_captions():
    row = {"class": "cat", "predicted": "dog", "confidence": 0.987}
    assert caption(row) == "cat\n→ dog 99 %\n"
    assert caption(row | {"index": 17, "file": None}) == "cat\n→ dog 99 %\nimage 17"
    assert caption(row | {"index": 17, "file": "/data/cats/7 a.png"}) == "cat\n→ dog 99 %\n7 a.png"
    assert max(map(len, caption(row | {"class": "x" * 99, "file": "z" * 99}).split("\n"))) == LETTERS


def test_text_is_shortened_in_its_middle():
    assert shortened("abcdefghij", 10) == "abcdefghij" and shortened("abcdefghijk", 10) == "abcd…ghijk"
    assert shortened("a\n b", 10) == "a b" and shortened("_$", 10) == " _\\$"
