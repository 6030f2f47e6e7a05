"""Accuracy on corrupted images against a plain loop: images, statistics, means, files, and what is refused."""

import copy
import json
import re
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image as PIL
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from apart_hf import ApartError
from apart_hf.cli.analyse import main
from apart_hf.paper.corruption_figures import plot_corruptions, render_corruptions
from apart_hf.paper.corruption_robustness import Accuracy, Contender, CorruptionTest, Robustness, readable_rows
from apart_hf.paper.corruptions import corrupt, corruption_names, corruption_number
from apart_hf.paper.recalibration import Estimate, halves, has_running_statistics, recalibrate
from tests.support.helpers import load, randomise_batchnorm, snapshot

CASES = [("fog", 1), ("fog", 5), ("gaussian_noise", 3)]
NAMES = ["cat", "dog", "fox"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eleven smooth images of 44x36 pixels of three classes to evaluate, and a few to train on."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 11)):
        for number in range(count):
            folder = root / split / NAMES[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            corners = PIL.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
            corners.resize((44, 36), PIL.Resampling.BICUBIC).save(folder / f"{number}.png")
    return root


def network(name, pixels, seed=0, **more):
    torch.manual_seed(seed)
    model = randomise_batchnorm(timm.create_model(name, num_classes=3, **more), seed).eval()
    model.pretrained_cfg |= {"input_size": (3, pixels, pixels), "crop_pct": 0.9, "mean": (0.3, 0.4, 0.5)}
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of three models, one without BatchNorm and one with its classes in another order."""
    root = tmp_path_factory.mktemp("models")
    for name, names in (("test_resnet", NAMES), ("test_vit", NAMES), ("test_byobnet", NAMES[::-1])):
        more = {"img_size": 32} if name == "test_vit" else {}
        model = network(name, 32 if name == "test_vit" else 24, **more)
        timm.models.save_for_hf(
            model, root / name, model_config={"label_names": names}, model_args=more, safe_serialization=True
        )
    return root


def contender(name, split, pixels=24, **more):
    model = network(name, pixels, **more)
    config = resolve_model_data_config(model)
    return Contender(name, model, create_transform(**config, is_training=False), split.labels())


def image(split, row):
    return np.asarray(PIL.open(split.cells([row])[0][0]["path"]).convert("RGB"))


def inputs(split, rows, one, case, seed):
    found = []
    for row in rows:
        pixels = image(split, row)
        if case is not None:
            drawn_by = (row, corruption_names().index(case[0]), case[1], seed)
            pixels = corrupt(pixels, *case, seed=drawn_by)
        found.append(one.transform(PIL.fromarray(pixels)))
    return torch.stack(found)


def keep(seen, name, layer, given):
    seen[name] = given[0].detach()


def with_statistics_of(model, images):
    """Plainly: each layer normalises by its input's own mean and variance, which it then keeps."""
    model, seen = copy.deepcopy(model), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(partial(keep, seen, name))
            layer.training = True
    with torch.no_grad():
        model(images)
        for name, layer in model.named_modules():
            if name in seen:
                layer.running_mean.copy_(seen[name].mean((0, 2, 3)))
                layer.running_var.copy_(seen[name].var((0, 2, 3)))
    return model.eval()


@pytest.mark.parametrize("workers", [0, 1])
def test_accuracies_are_those_of_a_plain_loop(workers, photos):
    split = load(data_dir=str(photos)).val
    rows = np.array([7, 2, 9, 0, 4, 10, 1])
    first, second = contender("test_resnet", split), contender("test_vit", split, pixels=32, img_size=32)
    before = snapshot(first.network), copy.deepcopy(first.network.state_dict())
    found = CorruptionTest(
        [first, second], split, rows, CASES, seed=5, recalibrated=True, batch_size=4, workers=workers
    ).run()
    assert [one.name for one in found] == ["test_resnet", "test_vit"]
    labels = torch.from_numpy(split.labels()[rows])
    for one, own in zip((first, second), found):
        for case in (None, *CASES):
            images = inputs(split, rows.tolist(), one, case, 5)
            with torch.no_grad():
                hits = int((one.network(images).argmax(-1) == labels).sum())
                again = 0
                for estimated, evaluated in ((slice(0, 4), slice(4, 7)), (slice(4, 7), slice(0, 4))):
                    changed = with_statistics_of(one.network, images[estimated])
                    again += int((changed(images[evaluated]).argmax(-1) == labels[evaluated]).sum())
            accuracy = own.clean if case is None else own.corrupted[case]
            assert accuracy.top1 == pytest.approx(100 * hits / 7)
            if one is first:
                assert accuracy.top1_recalibrated == pytest.approx(100 * again / 7)
            else:
                assert accuracy.top1_recalibrated is None and not has_running_statistics(one.network)
    assert before[0] == snapshot(first.network)
    assert all(torch.equal(value, before[1][key]) for key, value in first.network.state_dict().items())
    assert not first.network.training


def test_what_an_image_becomes_depends_on_its_row_and_the_seed_alone(photos, monkeypatch):
    """Not on the other images, corruptions and severities, nor on how they are shared out."""
    split, kept = load(data_dir=str(photos)).val, {}

    def watched(pixels, name, severity, *, seed):
        kept.setdefault((seed[0], name, severity, seed[-1]), set()).add(
            corrupt(pixels, name, severity, seed=seed).tobytes()
        )
        return pixels

    monkeypatch.setattr("apart_hf.paper.corruption_robustness.corrupt", watched)
    one = contender("test_vit", split, pixels=32, img_size=32)
    CorruptionTest([one], split, np.arange(8), CASES, seed=0).run()
    CorruptionTest([one], split, np.array([6, 3]), CASES[1:], seed=0, batch_size=1).run()
    assert len(kept) == 8 * 3 and all(len(found) == 1 for found in kept.values())
    CorruptionTest([one], split, np.array([6]), CASES[2:], seed=1).run()
    assert kept[6, "gaussian_noise", 3, 0] != kept[6, "gaussian_noise", 3, 1]
    pixels = image(split, 6)
    assert (
        corrupt(pixels, "fog", 5, seed=(6, 9, 5)) == corrupt(pixels, "fog", 5, seed=(6, 9, 5, 0))
    ).all()  # the study's
    assert [corruption_number(name) for name in corruption_names(common=False)] == list(range(19))


def test_statistics_of_several_batches_are_means_by_numbers_of_images():
    model = network("test_resnet", 24)
    torch.manual_seed(1)
    batches = [torch.randn(count, 3, 24, 24) + count for count in (5, 3, 2)]
    estimate = Estimate(model)
    for images in batches:
        estimate.add(images)
    found = estimate.finish()
    alone = [recalibrate(model, images) for images in batches]
    for key, value in found.state_dict().items():
        if "running" in key:
            parts = [one.state_dict()[key] * share for one, share in zip(alone, (0.5, 0.3, 0.2))]
            torch.testing.assert_close(value, sum(parts), msg=key)
    assert not any(module.training for module in found.modules())
    momenta = [layer.momentum for layer in found.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert momenta == [layer.momentum for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


@pytest.mark.parametrize("images", [4, 7])
def test_halves_are_disjoint_and_everything_is_evaluated_once(images):
    (first, second), (again, last) = halves(images)
    assert sorted([*second.tolist(), *last.tolist()]) == list(range(images))
    assert not set(first.tolist()) & set(second.tolist()) and (again.tolist(), last.tolist()) == (
        second.tolist(),
        first.tolist(),
    )


def test_means():
    values = {("fog", 1): (60.0, 70.0), ("fog", 5): (20.0, 50.0), ("snow", 1): (50.0, 66.0), ("snow", 5): (10.0, 30.0)}
    one = Robustness("a|b", Accuracy(90.0, 88.0), {case: Accuracy(*pair) for case, pair in values.items()})
    other = Robustness("plain", Accuracy(80.0), {case: Accuracy(pair[0] / 2) for case, pair in values.items()})
    assert one.of_corruption("fog") == Accuracy(40.0, 60.0) and one.of_severity(5) == Accuracy(15.0, 40.0)
    assert one.mean == Accuracy(35.0, 54.0) and other.mean == Accuracy(17.5)
    first, second = render_corruptions([one, other]).split("\n\n")
    assert first.splitlines() == [
        r"| corruption |  a\|b | a\|b, recalibrated | plain |",
        "| ---------- | ----: | -----------------: | ----: |",
        "| none       | 90.00 |              88.00 | 80.00 |",
        "| fog        | 40.00 |              60.00 | 20.00 |",
        "| snow       | 30.00 |              48.00 | 15.00 |",
        "| mean       | 35.00 |              54.00 | 17.50 |",
    ]
    assert [line.split("|")[1].strip() for line in second.splitlines()] == ["severity", "--------", "1", "5", "mean"]
    assert "| 5        | 15.00 |              40.00 |  7.50 |" in second


def test_the_picture(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("apart_hf.paper.corruption_figures.save", lambda figure, path: drawn.append(figure))
    corrupted = {
        (name, severity): Accuracy(10.0 * severity, 50.0) for name in corruption_names() for severity in (1, 5)
    }
    both = [Robustness("one", Accuracy(70.0, 69.0), corrupted), Robustness("two", Accuracy(60.0), corrupted)]
    both[1] = Robustness("two", Accuracy(60.0), {case: Accuracy(20.0) for case in corrupted})
    plot_corruptions(both, tmp_path / "x.png", "8 images")
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        name.replace("_", " ") for name in corruption_names()
    ]
    marks = [line for line in axes.get_lines() if line.get_marker() != "None"]
    assert len(marks) == 15 * 3 and {float(line.get_xdata()[0]) for line in marks} == {30.0, 50.0, 20.0}
    assert len({(line.get_marker(), line.get_markerfacecolor()) for line in marks}) == 3  # hollow, and of two kinds
    spans = [
        line.get_xdata() for line in axes.get_lines() if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"
    ]
    assert [10.0, 50.0] in [list(span) for span in spans]
    clean = [line for line in axes.get_lines() if line.get_linestyle() != "-" and line.get_marker() == "None"]
    assert [line.get_xdata()[0] for line in clean] == [70.0, 60.0] and clean[0].get_linestyle() != clean[
        1
    ].get_linestyle()


def command(photos, models, tmp_path, *more, names=("test_resnet",)):
    chosen = [word for name in names for word in ("--checkpoint", str(models / name))]
    flags = ["--data-dir", str(photos), "--corruptions", "contrast,fog", "--severities", "5,1", "--limit", "8"]
    main(["corruptions", *chosen, *flags, "--output", str(tmp_path / "out"), *more])


def test_the_command(photos, models, tmp_path, capsys):
    """Of models of anybody, with classes in another order and without BatchNorm, too."""
    names = ("test_resnet", "test_vit", "test_byobnet")
    command(photos, models, tmp_path, "--recalibrate", "--seed", "3", names=names)
    said = capsys.readouterr()
    assert "test_vit: no BatchNorm layer keeps running statistics; there is nothing to re-estimate." in said.err
    out = tmp_path / "out"
    assert sorted(file.name for file in out.iterdir()) == ["corruptions.json", "corruptions.md", "corruptions.png"]
    record = json.loads((out / "corruptions.json").read_text())
    assert (record["images"], record["severities"], record["corruptions"]) == (8, [1, 5], ["contrast", "fog"])
    assert record["rows"] == np.random.default_rng(3).permutation(11)[:8].tolist() and record["split"] == "val"
    split = load(data_dir=str(photos)).val
    cases = [(name, severity) for name in ("contrast", "fog") for severity in (1, 5)]
    for name, own in zip(names, record["models"]):
        model = timm.create_model(f"local-dir:{models / name}", pretrained=True).eval()
        transform = create_transform(**resolve_model_data_config(model), is_training=False)
        order = np.array([0, 1, 2] if name != "test_byobnet" else [2, 1, 0])
        one = Contender(name, model, transform, order[split.labels()])
        rows = np.array(record["rows"])
        (expected,) = CorruptionTest([one], split, rows, cases, 3, recalibrated=True).run()
        assert own["checkpoint"] == str(models / name) and own["clean"]["top1"] == expected.clean.top1
        for row in own["corruptions"]:
            accuracy = expected.corrupted[row["corruption"], row["severity"]]
            assert (row["top1"], row.get("top1_recalibrated")) == (accuracy.top1, accuracy.top1_recalibrated)
        assert own["mean"]["top1"] == pytest.approx(expected.mean.top1)
        hits = sum(
            int(model(transform(PIL.fromarray(image(split, row)))[None]).argmax() == order[split.labels()[row]])
            for row in rows.tolist()
        )
        assert own["clean"]["top1"] == pytest.approx(100 * hits / 8)
    text = (out / "corruptions.md").read_text()
    assert text.startswith(f"8 images of {photos.name}, split val: top-1 accuracy in %\n\n| corruption | ")
    assert text.split("\n\n", 1)[1] in said.out and "test_vit, recalibrated" not in text
    with PIL.open(out / "corruptions.png") as picture:
        picture.load()
        assert picture.width > 700 and len(picture.convert("RGB").getcolors(10**6)) > 50
    with pytest.raises(SystemExit) as stop:
        command(photos, models, tmp_path)
    assert stop.value.code == 2 and "out/corruptions.md exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--corruptions", "fog,smog"], "unknown corruption 'smog': did you mean 'fog'"),
        (["--severities", "0,3"], "--severities: 0,3: must be numbers from 1 to 5"),
        (["--severities", "x"], "--severities: invalid _?severities value: 'x'"),
        (["--limit", "0"], "--limit: 0: must be from 1"),
        (["--limit", "3", "--recalibrate"], "--recalibrate: 3 images have no halves of two or more; take 4"),
        (["--label", "a", "--label", "b"], "1 checkpoints are labelled a, b"),
        (["--checkpoint", "none"], "unknown pretrained model 'none'"),
        (["--checkpoint", "demo-test_resnet-apart"], "the model: .* class names are not in both it and the data"),
        (["--data-dir", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(more, message, photos, models, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command(photos, models, tmp_path, *more)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_small_images_and_other_classes_are_refused(models, tmp_path, capsys):
    """Those of the demo set have 28 pixels and 10 classes."""
    for checkpoint, message in (
        ("demo-test_resnet-apart", r"image \d+ of split 'test' .* has 28x28 pixels; corruptions need at least 32x32"),
        (str(models / "test_resnet"), "class names are not in both it and the data"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["corruptions", "--checkpoint", checkpoint, "--limit", "4", "--output", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and re.search(message, error), error
        assert not (tmp_path / "out").exists()


def test_another_number_of_nameless_classes_is_refused(photos, tmp_path, capsys):
    model = timm.create_model("test_resnet", num_classes=5)
    timm.models.save_for_hf(model, tmp_path / "model", safe_serialization=True)
    with pytest.raises(SystemExit) as stop:
        main(["corruptions", "--checkpoint", str(tmp_path / "model"), "--data-dir", str(photos)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "the model has 5 classes without names, and" in error and "has 3; name data" in error


def test_a_missing_package_is_named(photos, models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("apart_hf.paper.corruptions.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        command(photos, models, tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and 'pip install "apart-hf[corruptions]"' in error
    assert not (tmp_path / "out").exists()


def test_one_bad_image(photos, tmp_path):
    """It ends the measuring before it begins, or is left out."""
    (tmp_path / "val/cat").mkdir(parents=True)
    for number, content in enumerate([(photos / "val/cat/0.png").read_bytes(), b"no image"]):
        (tmp_path / f"val/cat/{number}.png").write_bytes(content)
    (tmp_path / "val/dog").mkdir()
    (tmp_path / "val/dog/0.png").write_bytes((photos / "val/cat/0.png").read_bytes()[:300])
    split = load(data_dir=str(tmp_path), only="val", skip_bad=True).val
    assert readable_rows(split, np.array([2, 1, 0]), skip_bad=True).tolist() == [0]
    with pytest.raises(ApartError, match=r"image 1 of split 'val' \(.*cat/1.png\) cannot be decoded"):
        readable_rows(split, np.array([0, 1]), skip_bad=False)
    with pytest.raises(ApartError, match="no image of split 'val' can be decoded"):
        readable_rows(split, np.array([1, 2]), skip_bad=True)
