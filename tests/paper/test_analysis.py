"""Figures 1 and 2: the logits behind them against a plain loop over groups, or a plain formula, in float64."""

import copy
import csv
import itertools
import re

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf import ApartError, load_pretrained
from apart_hf.batchnorm.patching import supported_layers
from apart_hf.cli import analyse
from apart_hf.data import IGNORED
from apart_hf.data.dataset_map import TransformedImages
from apart_hf.paper.bn_robustness import attack, robustness, scaled_statistics
from apart_hf.paper.figures import _draw
from apart_hf.utils.plotting import plain, styles
from tests.reference import _NaiveBatchNorms, reference_step
from tests.support.helpers import batch, build, load, snapshot

DEMO = "demo-test_resnet-apart"
EPSILONS, GROUPS = (0.0, 0.1, 0.3), (1, 2, 3)


@pytest.fixture
def batches():
    """Three whole batches, one with an image that was not decoded, and an incomplete one."""
    found = [batch(12, seed=seed) for seed in range(5)]
    found[2][1][4] = IGNORED
    found[4] = tuple(part[:5] for part in found[4])
    return found


def seen_logits(model):
    """A list that gets what every forward of the model, or a copy of it, returns."""
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    return seen


def with_batch_statistics(model):
    """A copy that normalises by its batch, and is in eval mode otherwise."""
    network = copy.deepcopy(model).eval()
    for layer in network.modules():
        if isinstance(layer, _BatchNorm):
            layer.training = True
    return network


def oracle_logits(network, images, deltas, groups):
    """A forward for each group by itself."""
    network = copy.deepcopy(network)
    norms = _NaiveBatchNorms(network)
    norms.track = False
    norms.set(*({name: pair[i] for name, pair in deltas.items()} for i in (0, 1)))
    logits = images.new_zeros(len(images), 5)
    with torch.no_grad():
        for j in range(groups):
            logits[j::groups] = network(images[j::groups])
    return logits


def oracle_deltas(network, case, first):
    """(delta_mu, delta_sigma) of every layer for a row of the table."""
    epsilon = case["epsilon"]
    if case["perturbation"] == "apart":
        return reference_step(network, *first, nn.functional.cross_entropy, "apart", epsilon=epsilon, groups=1)[2]
    widths = [layer.num_features for layer in supported_layers(network).values()]
    generator, total = torch.Generator().manual_seed(7 + case["draw"]), 2 * sum(widths)
    if case["perturbation"] == "uniform":
        drawn = 2 * torch.rand(total, generator=generator).double() - 1
    else:
        drawn = 2 * torch.randint(2, (total,), generator=generator).double() - 1
    parts = iter((epsilon * drawn).split([width for width in widths for _ in range(2)]))
    return {name: (next(parts), next(parts)) for name in supported_layers(network)}


@pytest.mark.parametrize("name, options", [("test_byobnet", {"drop_rate": 0.5}), ("bn1d", {})])
def test_attacked_logits_are_those_of_a_loop_over_groups(name, options, batches):
    model = build(name, **options)
    plain, seen = with_batch_statistics(model), seen_logits(model)
    rows = attack(model, batches, batch_size=12, epsilons=EPSILONS, groups=GROUPS, draws=2, seed=7)
    assert len(rows) == len(EPSILONS) * (len(GROUPS) + 2 * 2)
    whole = [batches[i] for i in (0, 1, 3)]
    assert len(seen) == 1 + 3 * len(rows)  # the first step, and each batch once a row
    for number, row in enumerate(rows):
        deltas, hits = oracle_deltas(plain, row, whole[0]), 0
        for index, (images, targets) in enumerate(whole):
            expected = oracle_logits(plain, images, deltas, row["groups"])
            actual = seen[1 + index * len(rows) + number]
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
            hits += int((expected.argmax(-1) == targets).sum())
        assert (row["images"], row["top1"]) == (36, pytest.approx(100 * hits / 36))


def test_perturbations_differ_as_their_names_say(batches):
    """Without a radius all of one group agree; with one, the adversary costs more than either kind of noise."""
    model = build("test_byobnet", dtype=torch.float32)
    images = torch.cat([images for images, _ in batches[:4]]).float()
    with torch.no_grad():
        labels = with_batch_statistics(model)(images).argmax(-1)  # so that there is accuracy to lose
    rows = attack(model, [(images, labels)], batch_size=48, epsilons=(0.0, 0.2), groups=(1, 4), draws=3)
    found = {}
    for row in rows:
        found.setdefault((row["perturbation"], row["groups"], row["epsilon"]), []).append(row["top1"])
    assert found["apart", 1, 0.0] == [100] and {*found["uniform", 1, 0.0], *found["signs", 1, 0.0]} == {100}
    assert found["apart", 4, 0.0][0] < 100
    assert found["apart", 1, 0.2][0] < min(found["signs", 1, 0.2]) <= np.mean(found["uniform", 1, 0.2])
    assert len(set(found["signs", 1, 0.2])) > 1


def test_scaled_statistics_give_the_formulas_logits(batches):
    model, plain = build("test_byobnet", drop_rate=0.5), build("test_byobnet").eval()
    seen = seen_logits(model)
    rows = robustness(model, batches, epsilons=EPSILONS, draws=2, seed=7)
    assert [(r["statistic"], r["draw"], r["epsilon"]) for r in rows] == [
        (statistic, draw, epsilon) for statistic in ("mean", "std") for draw in (0, 1) for epsilon in EPSILONS
    ]
    logits = []
    for row in rows:
        network, hits = copy.deepcopy(plain), 0
        generator = torch.Generator().manual_seed(7 + row["draw"])
        for layer in network.modules():
            if isinstance(layer, _BatchNorm):
                of_mean, of_std = 2 * torch.randint(2, (2, layer.num_features), generator=generator).double() - 1
                if row["statistic"] == "mean":
                    layer.running_mean.mul_(1 + row["epsilon"] * of_mean)
                else:
                    sigma = (layer.running_var + layer.eps).sqrt() * (1 + row["epsilon"] * of_std)
                    layer.running_var.copy_(sigma.square() - layer.eps)
        for images, targets in batches:
            with torch.no_grad():
                logits.append(network(images))
            hits += int((logits[-1].argmax(-1) == targets).sum())
        assert (row["images"], row["top1"]) == (52, pytest.approx(100 * hits / 52))
    for number in range(len(rows)):
        for index in range(len(batches)):
            expected = logits[number * len(batches) + index]
            torch.testing.assert_close(seen[index * len(rows) + number], expected, rtol=1e-9, atol=1e-9)
    assert rows[0]["top1"] == rows[len(rows) // 2]["top1"]
    assert not torch.allclose(logits[0], logits[2 * len(batches)], atol=0.1)  # a radius has an effect


def test_models_of_one_architecture_get_one_direction():
    one, other = (supported_layers(build("test_byobnet", seed=seed)) for seed in (0, 1))

    def direction(layers, statistic, seed):
        scaled = scaled_statistics(layers, statistic, 0.25, seed)
        if statistic == "mean":
            return torch.cat([scaled[f"{name}.running_mean"] / layer.running_mean for name, layer in layers.items()])
        return torch.cat(
            [
                ((scaled[f"{name}.running_var"] + layer.eps) / (layer.running_var + layer.eps)).sqrt()
                for name, layer in layers.items()
            ]
        )

    found = {statistic: direction(one, statistic, 3) for statistic in ("mean", "std")}
    for statistic, scales in found.items():
        assert torch.allclose((scales - 1).abs(), torch.full_like(scales, 0.25))
        assert 0.3 < (scales > 1).double().mean() < 0.7
        assert torch.allclose(scales, direction(other, statistic, 3))
        assert not torch.allclose(scales, direction(one, statistic, 4))
    assert not torch.allclose(found["mean"], found["std"])


def interrupted(batches):
    yield from batches[:2]
    raise RuntimeError("the disk is gone")


@pytest.mark.parametrize(
    "measure",
    [
        lambda model, batches: attack(model, batches, batch_size=12, epsilons=[0.3], groups=[2], draws=1),
        lambda model, batches: robustness(model, batches, epsilons=[0.3]),
    ],
    ids=["attack", "robustness"],
)
def test_the_model_is_left_as_it_was(measure, batches):
    model = build("test_byobnet", drop_rate=0.5)
    nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    next(model.parameters()).requires_grad_(False)

    def everything():
        tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters()), torch.get_rng_state()]
        flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
        return (snapshot(model), flags), [t.clone() for t in tensors]

    before = everything()
    measure(model, batches)
    after = everything()
    with pytest.raises(RuntimeError, match="the disk is gone"):
        measure(model, interrupted(batches))
    for state, tensors in (after, everything()):
        assert state == before[0] and all(torch.equal(a, b) for a, b in zip(tensors, before[1]))


@pytest.mark.parametrize(
    "measure, options, message",
    [
        (attack, {"batch_size": 12, "epsilons": [0.1], "groups": [5]}, "groups=5 does not divide the 12 samples"),
        (attack, {"batch_size": 12, "epsilons": [0.1], "groups": [0]}, "groups=0"),
        (attack, {"batch_size": 12, "epsilons": [-0.1], "groups": [1]}, "epsilon=-0.1"),
        (attack, {"batch_size": 16, "epsilons": [0.1], "groups": [1]}, "no batch of 16 images; take more"),
        (robustness, {"epsilons": [float("nan")]}, "epsilon=nan"),
        (robustness, {"epsilons": [0.1, 1.0]}, r"epsilon=1\.0: .* choose radii below 1"),
    ],
)
def test_values_out_of_range(measure, options, message, batches):
    with pytest.raises(ApartError, match=message):
        measure(build("test_byobnet"), batches, **options)


def test_models_without_statistics(batches):
    plain = timm.create_model("test_vit", num_classes=5)
    for measure in (robustness, lambda *a, **more: attack(*a, batch_size=12, **more)):
        with pytest.raises(ApartError, match="VisionTransformer has no BatchNorm layer"):
            measure(plain, batches, epsilons=[0.1])
    untracked = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten())
    with pytest.raises(ApartError, match="layer '0' keeps no running statistics"):
        robustness(untracked, batches, epsilons=[0.1])
    with pytest.raises(ApartError, match="no image that can be decoded"):
        robustness(build("test_byobnet"), [(batches[0][0], torch.full((12,), IGNORED))], epsilons=[0.1])


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
    command = [
        figure,
        *arguments,
        "--images",
        "70",
        "-b",
        "32",
        "--epsilons",
        "0.3,0",
        "--seed",
        "5",
        "--output",
        str(tmp_path / "new" / "out"),
    ]
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
