"""The optimizer is timm's for the given settings: its numbers, its groups of parameters, their shares of the rate."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from apart_hf import ApartError
from apart_hf.config.checks import check_names
from apart_hf.config.defaults import fill_defaults
from apart_hf.config.train_config import TrainConfig
from apart_hf.runs.components import make_optimizer, make_scheduler


def make(model="test_resnet", **given):
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=5)
    config = TrainConfig(lr=0.1, weight_decay=0.01, **given)
    check_names(config)
    config = fill_defaults(config)
    return network, config, make_optimizer(config, network, 0.1)


@pytest.mark.parametrize(
    "given, settings",
    [
        ({"opt": "adamw", "opt_eps": 1e-3, "opt_betas": [0.8, 0.9]}, {"eps": 1e-3, "betas": [0.8, 0.9]}),
        ({"opt": "adan", "opt_betas": [0.9, 0.8, 0.7]}, {"betas": [0.9, 0.8, 0.7]}),
        ({"opt": "rmsproptf", "opt_eps": 0.001}, {"eps": 0.001, "momentum": 0.9}),
        ({"opt": "adamw", "opt_kwargs": ["amsgrad=True", "maximize=True"]}, {"amsgrad": True, "maximize": True}),
        ({"opt": "sgd", "opt_kwargs": ["dampening=0.0", "nesterov=False"]}, {"nesterov": False}),
        ({"opt": "momentum"}, {"momentum": 0.9, "nesterov": False}),
    ],
)
def test_its_settings(given, settings):
    _, _, optimizer = make(**given)
    (group,) = optimizer.param_groups  # one: weight decay is on all parameters
    assert {key: list(group[key]) if isinstance(group[key], tuple) else group[key] for key in settings} == settings
    assert group["weight_decay"] == 0.01


def test_an_eps_moves_the_weights_otherwise():
    moved = []
    for eps in (None, 0.5):
        network, _, optimizer = make(opt="adam", opt_eps=eps)
        before = network.fc.weight.detach().clone()
        network.fc.weight.grad = torch.full_like(before, 0.25)
        optimizer.step()
        moved.append((before - network.fc.weight).mean().item())
    # with decay beside the gradient, Adam's first step is lr * g / (|g| + eps)
    assert moved == pytest.approx([0.1, 0.1 * 0.25 / 0.75], rel=0.05)


@pytest.mark.parametrize("model", ["test_resnet", "test_efficientnet", "preact_resnet18"])
def test_layers_have_shares_of_the_rate(model):
    network, config, optimizer = make(model, layer_decay=0.5, sched="constant", warmup_epochs=1, epochs=3)
    theirs = create_optimizer_v2(
        network, "momentum", lr=0.1, weight_decay=0.01, momentum=0.9, filter_bias_and_bn=False, layer_decay=0.5
    )
    of = {p: g for g in optimizer.param_groups for p in g["params"]}
    assert len(optimizer.param_groups) == len(theirs.param_groups) > 3
    for ours, want in zip(optimizer.param_groups, theirs.param_groups):
        assert (ours["lr_scale"], ours["weight_decay"]) == (want["lr_scale"], want["weight_decay"])
        assert [id(p) for p in ours["params"]] == [id(p) for p in want["params"]]
    assert len(of) == len(list(network.parameters()))  # every one once
    assert of[network.get_classifier().weight]["lr_scale"] == 1
    first = next(iter(network.parameters()))
    assert of[first]["lr_scale"] == min(g["lr_scale"] for g in optimizer.param_groups) < 0.2
    scheduler = make_scheduler(config, optimizer, 4)
    for epoch, rate in [(1, 0.1), (2, 0.1)]:
        scheduler.step(epoch)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(
            [rate * g["lr_scale"] for g in optimizer.param_groups]
        )


@pytest.mark.parametrize(
    "given, message",
    [
        ({"opt": "adamw", "opt_kwargs": ["amsgrd=True"]}, "cannot create optimizer 'adamw': .*amsgrd"),
        ({"opt": "adamw", "opt_betas": [0.9]}, "--opt-betas 0.9: the optimizer 'adamw' has 2, 0.9 0.999 unless given"),
        ({"opt": "adan", "opt_betas": [0.9, 0.8]}, "--opt-betas 0.9 0.8: the optimizer 'adan' has 3, 0.98 0.92 0.99"),
    ],
)
def test_what_an_optimizer_does_not_take(given, message):
    with pytest.raises(ApartError, match=message):
        make(**given)
