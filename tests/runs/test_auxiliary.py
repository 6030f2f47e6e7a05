"""What a strategy holds beside the model: trained with it, kept by checkpoints, and in no export."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from apart_hf.__main__ import main
from apart_hf.config.defaults import fill_defaults
from apart_hf.runs.interruption import StopRequest
from apart_hf.runs.prepare import prepare
from apart_hf.runs.train import train
from tests.support.processes import assert_equal_runs, latest
from tests.support.settings import settings

MORE = {"method": "advprop", "steps": 2, "random_start": True, "aux_affine": True, "ratio": 0.5}
MORE |= {"checkpoint_every": "1", "epochs": 1, "threads": 1, "max_steps": 4, "sched": "cosine"}


def kept(run):
    """What the newest checkpoint keeps of auxiliary BN."""
    return torch.load(latest(run) / "process-0.pt", weights_only=True)["strategy"]["auxiliary"]


def test_a_run_goes_on_exactly_and_exports_the_model_alone(little, tmp_path):
    whole = train(settings(little, tmp_path / "whole", **MORE))
    part = shutil.copytree(whole, tmp_path / "part" / "run")
    for name in sorted((part / "checkpoints").glob("step-*"))[2:]:
        shutil.rmtree(name)
    earlier = kept(part)
    assert_equal_runs(whole, train(settings(little, tmp_path / "part", **MORE, resume="auto")))
    own, other = kept(whole), kept(part)
    assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
    assert not any(torch.equal(own[key], earlier[key]) for key in own)
    exported = load_file(whole / "last/model.safetensors")
    assert not torch.equal(own["bn1.weight"], exported["bn1.weight"])
    prepared = prepare(fill_defaults(settings(little, tmp_path / "new", **MORE)), StopRequest()).trainer
    network = prepared.accelerator.unwrap_model(prepared.model)
    assert exported.keys() == network.state_dict().keys()
    held = list(prepared.strategy.parameters())
    assert prepared.optimizer.param_groups[-1]["params"] == held
    inputs = prepared.strategy.perturbations[0]
    assert (inputs._mean, inputs._std) == ([0.5] * 3, [0.5] * 3)


def test_the_trainer_s_own_mean_and_deviation(little, tmp_path):
    more = {"method": "fast-advprop", "mean": [0.1, 0.2, 0.3], "std": [0.4]}
    trainer = prepare(fill_defaults(settings(little, tmp_path, **more)), StopRequest()).trainer
    inputs = trainer.strategy.perturbations[0]
    assert inputs._mean == [0.1, 0.2, 0.3] and inputs._std == [0.4] * 3
    assert len(trainer.optimizer.param_groups) == 1 and trainer.strategy.passes == 1.25


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--pixel-epsilon 256", "pixel_epsilon=256.0: the radius in units of 1/255 is in [0, 255]"),
        ("--pixel-epsilon -1", "pixel_epsilon=-1.0: the radius in units of 1/255 is in [0, 255]"),
        ("--pixel-step nan", "pixel_step=nan: the size of a step in units of 1/255 is in [0, 255]"),
        ("--steps 0", "steps=0: must be a finite number of at least 1"),
        ("--method fast-advprop --steps 2", "method 'fast-advprop' has no hyper-parameter 'steps'"),
        ("--method apart --aux-affine", "method 'apart' has no hyper-parameter 'aux_affine'"),
        ("--model vit_tiny_patch16_224 --img-size 32 --aux-affine", "has no BatchNorm layer with gamma and beta"),
    ],
)
def test_bad_input_ends_in_one_line(flags, said, little, tmp_path, capsys):
    command = [
        "train",
        "--data-dir",
        little,
        "--output",
        str(tmp_path),
        "--model",
        "test_resnet",
        "--method",
        "advprop",
    ]
    with pytest.raises(SystemExit) as caught:
        main([*command, "-b", "8", "--max-steps", "1", *flags.split()])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and said in error and error.count("\n") == 1
