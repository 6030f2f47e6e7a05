"""Figures 1 and 2 by command: the files, the drawing, and what is refused."""

import csv
import itertools
import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from apart_hf import load_pretrained
from apart_hf.cli import analyse
from apart_hf.data.dataset_map import TransformedImages
from apart_hf.paper import figures
from apart_hf.paper.figures import _draw
from apart_hf.paper.results import Difference
from apart_hf.utils.plotting import plain, styles
from tests.support.helpers import load, with_batch_statistics

DEMO = "demo-test_resnet-apart"


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_curves_differ_without_their_colours():
    rows = [
        {"model": f"m{i}", "epsilon": epsilon, "top1": 50.0 + i - 10 * epsilon + draw}
        for i in range(15)
        for epsilon in (0.0, 0.1)
        for draw in ((-1, 1) if i == 3 else (0,))
    ]
    axes = Figure().subplots()
    _draw(axes, rows, lambda row: plain(row["model"]))
    lines = axes.get_lines()
    assert [line.get_label() for line in lines] == [f"m{i}" for i in range(15)]
    assert all(np.allclose(line.get_ydata(), [50 + i, 49 + i]) for i, line in enumerate(lines))
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 15
    (band,) = axes.collections  # of the one with two draws
    assert band.get_paths()[0].vertices[:, 1].min() == 51 and band.get_paths()[0].vertices[:, 1].max() == 54
    assert len(set(itertools.islice(styles(), 56))) == 56
    axes.plot([0], [0], label=plain("_hidden?"))
    assert axes.get_legend_handles_labels()[1][-1] == " _hidden?"


def test_what_costs_the_same_stands_at_one_tick(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    gain = Difference(1.0, 0.5)
    figures.plot_gains(
        [("a", 2.0, gain), ("b", 2.0, gain), ("c", 1.25, Difference(2.0, None))], tmp_path / "x.png", "t"
    )
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1.25", "2"]
    one, other, third = (float(bars.lines[0].get_xdata()[0]) for bars in axes.containers)
    assert one < 2 < other and other - one < 0.1 and third == 1.25
    low, high = axes.get_xlim()
    assert low < 1.25 and high > other  # one cost alone keeps its place, too


def test_nothing_is_left_where_a_checkpoint_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        analyse.main(["attack", "--checkpoint", "nope", "--output", str(tmp_path / "new")])
    assert "nope" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "figure, arguments, split",
    [
        ("attack", ["--checkpoint", DEMO, "--groups", "1,4", "--draws", "1"], "train"),
        ("robustness", ["--checkpoint", DEMO, "--checkpoint", DEMO, "--label", "a", "--label", "b"], "val"),
    ],
)
def test_the_commands(figure, arguments, split, tmp_path, monkeypatch, capsys):
    returned, measure = [], getattr(analyse, figure)
    monkeypatch.setattr(analyse, figure, lambda *a, **k: returned.append(measure(*a, **k)) or returned[-1])
    flags = "--images 70 -b 32 --epsilons 0.3,0 --seed 5"
    command = [figure, *arguments, *flags.split(), "--output", str(tmp_path / "new" / "out")]
    analyse.main(command)
    out = tmp_path / "new" / "out"
    rows = table(out / f"{figure}.csv")
    labels = [DEMO] if figure == "attack" else ["a", "b"]
    assert rows == [
        {"model": label, **{key: str(value) for key, value in row.items()}}
        for label, part in zip(labels, returned)
        for row in part
    ]
    images = 64 if figure == "attack" else 70
    assert {row["images"] for row in rows} == {str(images)} and {row["epsilon"] for row in rows} == {"0.0", "0.3"}
    assert f"{images} images, {len(rows)} accuracies; written: {out}" in capsys.readouterr().out
    with Image.open(out / f"{figure}.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 700 and len(picture.convert("RGB").getcolors(10**6)) > 50

    # the first row of radius 0 again: these images, by the recorded transform, plainly
    model, transform = load_pretrained(DEMO)
    data = getattr(load(), split)
    chosen = np.random.default_rng(5).permutation(len(data))[:images].tolist()
    found = TransformedImages(data, transform).__getitems__(chosen)
    inputs, targets = torch.stack([image for image, _ in found]), torch.tensor([label for _, label in found])
    network = with_batch_statistics(model) if figure == "attack" else model
    with torch.no_grad():
        logits = torch.cat([network(part) for part in inputs.split(32)])
    assert float(rows[0]["top1"]) == pytest.approx(100 * (logits.argmax(-1) == targets).double().mean().item())

    with pytest.raises(SystemExit) as stop:
        analyse.main(command)
    assert stop.value.code == 2 and re.search(r"out/\w+\.csv exists already", capsys.readouterr().err)
    assert table(out / f"{figure}.csv") == rows


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: FIGURE"),
        (["attack"], "required: --checkpoint"),
        (["attack", "--checkpoint", "demo-test_resnet-apar"], "unknown pretrained model .* did you mean"),
        (["attack", "--checkpoint", DEMO, "-b", "64", "--groups", "1,5"], "groups=5 does not divide the 64"),
        (["attack", "--checkpoint", DEMO, "--groups", "0,2"], "--groups: 0,2: must be finite and from 1"),
        (["attack", "--checkpoint", DEMO, "--groups", "1;2"], "--groups: invalid numbers value: '1;2'"),
        (["attack", "--checkpoint", DEMO, "--epsilons", "0,-0.1"], "--epsilons: 0,-0.1: must be finite and from 0"),
        (["attack", "--checkpoint", DEMO, "--epsilons", "0,inf"], "must be finite"),
        (["attack", "--checkpoint", DEMO, "--epsilons", ""], "--epsilons: invalid numbers value"),
        (["attack", "--checkpoint", DEMO, "--images", "100", "--groups", "1"], "no batch of 128 images"),
        (["attack", "--checkpoint", DEMO, "--images", "0"], "--images: 0: must be from 1"),
        (["attack", "--checkpoint", DEMO, "--train-split", "dev"], "no split 'dev': the splits are train, test"),
        (["attack", "--checkpoint", DEMO, "--data-dir", "/nowhere"], "/nowhere does not exist"),
        (["attack", "--checkpoint", DEMO, "--output", __file__], "cannot write .*: File exists"),
        (
            ["robustness", "--checkpoint", DEMO, "--epsilons", "0,1.5", "--images", "8"],
            r"epsilon=1\.5: .* radii below 1",
        ),
        (
            ["robustness", "--checkpoint", DEMO, "--checkpoint", DEMO],
            f"2 checkpoints are labelled {DEMO}, {DEMO}; give",
        ),
        (["robustness", "--checkpoint", DEMO, "--label", "a", "--label", "b"], "1 checkpoints are labelled a, b"),
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(arguments, message, tmp_path, capsys):
    out = [] if "--output" in arguments or not arguments else ["--output", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        analyse.main([*arguments, *out])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and re.search(message, error), error
    assert not list(tmp_path.iterdir())
