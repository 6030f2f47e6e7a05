"""What becomes of running statistics that differ between processes."""

import os

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator

from apart_hf.cli.train import main
from apart_hf.training import trainer
from apart_hf.training.distributed_statistics import average_statistics, running_statistics, with_first_buffers
from tests.support.helpers import build
from tests.support.processes import TRAIN, command, fork_ranks


def test_one_process_has_its_own():
    model, accelerator = build("test_resnet"), Accelerator(cpu=True)
    before = running_statistics(model)
    assert all(name.endswith(("running_mean", "running_var")) for name in before) and before
    average_statistics(accelerator, model)
    assert with_first_buffers(accelerator, model) is model
    assert all(torch.equal(value, before[name]) for name, value in running_statistics(model).items())


def recording_main(arguments):
    """Keep what each process has before its statistics become the mean, and after."""
    folder, *flags = arguments
    mean = trainer.average_statistics

    def average(accelerator, *networks):
        found = []
        for when in ("before", "after"):
            plain = [accelerator.unwrap_model(network) for network in networks]
            found.append([running_statistics(network) for network in plain])
            if when == "before":
                mean(accelerator, *networks)
        torch.save(found, f"{folder}/{os.environ['RANK']}.pt")

    trainer.average_statistics = average
    main(flags)


@pytest.mark.process
@pytest.mark.parametrize("averaged", [False, True])
def test_what_is_evaluated_is_the_mean_of_the_processes(averaged, little, tmp_path):
    flags = ["-b", "4", "--max-steps", "3", "--dist-bn", "reduce", *(["--model-ema"] if averaged else [])]
    given = command(little, tmp_path, *flags)[len(TRAIN) :]
    ranks = fork_ranks([*TRAIN, str(tmp_path), *given], main=recording_main)
    for rank in ranks:
        rank.wait(250)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].communicate()
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    exported = safetensors.torch.load_file(tmp_path / "run/last/model.safetensors")
    for kind in range(2):  # the network, and what is evaluated
        before, after = ([rank[when][kind] for rank in both] for when in range(2))
        differ = 0
        for name, one in before[0].items():
            other = before[1][name]
            differ += not torch.equal(one, other)
            assert torch.equal(after[0][name], (one + other) / 2) and torch.equal(after[0][name], after[1][name])
        assert differ == len(before[0])
    assert all(torch.equal(exported[name], value) for name, value in both[0][1][1].items())
