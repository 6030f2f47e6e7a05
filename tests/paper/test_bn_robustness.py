"""The logits behind Figures 1 and 2 against a plain loop over groups, or a plain formula, in float64."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from apart_hf import ApartError
from apart_hf.batchnorm.patching import supported_layers
from apart_hf.data import IGNORED
from apart_hf.paper.bn_robustness import attack, robustness, scaled_statistics
from tests.reference import _NaiveBatchNorms, reference_step
from tests.support.helpers import batch, build, snapshot, with_batch_statistics

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
