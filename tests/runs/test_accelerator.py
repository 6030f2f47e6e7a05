"""What accelerate reads from the environment agrees with what a run records and its schedule counts, or is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from torch import nn

from apart_hf.cli.train import main
from apart_hf.config.train_config import TrainConfig
from apart_hf.errors import ApartError
from apart_hf.runs.accelerator import _check_device, make_accelerator
from apart_hf.runs.train import train
from tests.support.helpers import forget_accelerator
from tests.support.settings import settings

STEPS, AMP = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION"
DYNAMO = "ACCELERATE_DYNAMO_BACKEND"


@pytest.mark.parametrize(
    "variable, value, given, message",
    [
        (STEPS, "4", {}, f"{STEPS}=4, and --grad-accum-steps 1, .*; unset the variable, or give --grad-accum-steps 4"),
        (STEPS, "4", {"grad_accum_steps": 2}, f"{STEPS}=4, and --grad-accum-steps 2, "),
        (STEPS, "1", {"grad_accum_steps": 2}, f"{STEPS}=1, and --grad-accum-steps 2, "),
        (STEPS, "0", {}, f"{STEPS}=0, and --grad-accum-steps 1, .* counts steps; unset the variable.$"),
        (STEPS, "auto", {}, f"{STEPS}=auto, and --grad-accum-steps 1, .* counts steps; unset the variable.$"),
        (DYNAMO, "inductor", {}, f"{DYNAMO}=inductor, and --no-torchcompile .* to no .*, or give --torchcompile.$"),
        (DYNAMO, "AOT_EAGER", {}, f"{DYNAMO}=AOT_EAGER, and --no-torchcompile .*launch --dynamo_backend no\\).$"),
        (DYNAMO, "eager", {"torchcompile": True}, f"{DYNAMO}=eager, and --torchcompile compiles by inductor"),
        (AMP, "fp8", {}, f"{AMP}=fp8 is no precision .*: no, bf16 or fp16 .*or give --amp-dtype"),
        (AMP, "bfloat16", {}, f"{AMP}=bfloat16 is no precision"),
        (AMP, "fp16", {}, "float16 needs a GPU"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", {}, "a parallelism config of accelerate shards weights"),
    ],
)
def test_a_contradiction_is_refused(variable, value, given, message, little, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ApartError, match=message) as raised:
        train(settings(little, tmp_path / "runs", **given))
    assert "\n" not in str(raised.value) and not any(tmp_path.iterdir())


@pytest.mark.parametrize("environment, accumulated", [({}, 1), ({}, 4), ({STEPS: "4", DYNAMO: "NO", AMP: "no"}, 4)])
def test_steps_are_those_that_the_schedule_counts(environment, accumulated, little, tmp_path, monkeypatch):
    """72 images in batches of 8 are 9 batches; an epoch ends with a step of what is left, here one batch."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    steps = {1: 9, 4: 3}[accumulated]
    folder = train(
        settings(
            little, tmp_path, epochs=2, lr=0.02, sched="cosine", grad_accum_steps=accumulated, checkpoint_every=None
        )
    )
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert (written["grad_accum_steps"], written["torchcompile"], written["amp_dtype"]) == (
        accumulated,
        False,
        "float32",
    )
    assert sorted(entry.name for entry in (folder / "checkpoints").glob("step-*")) == [
        f"step-{epoch * steps:08}" for epoch in (1, 2)
    ]
    rates = [json.loads(line)["lr"] for line in (folder / "metrics.jsonl").open()]
    last = [torch.tensor(torch.pi * (n - 1) / (2 * steps)).cos() for n in (steps, 2 * steps)]
    assert rates == pytest.approx([0.01 * (1 + float(cosine)) for cosine in last], rel=1e-5)


@pytest.mark.parametrize("given, found", [(None, "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_precision_left_open_is_read_from_there(given, found, little, tmp_path, monkeypatch):
    monkeypatch.setenv(AMP, "bf16")
    folder = train(settings(little, tmp_path, amp_dtype=given, epochs=1, max_steps=1, checkpoint_every=None))
    assert yaml.safe_load((folder / "config.yaml").read_text())["amp_dtype"] == found
    monkeypatch.setenv(AMP, "no")
    forget_accelerator()
    again = settings(little, tmp_path, epochs=1, max_steps=1, checkpoint_every=None, resume="auto")
    if found == "float32":
        assert train(again) == folder
    else:
        with pytest.raises(ApartError, match=r"amp_dtype \(was bfloat16, now float32\)"):
            train(again)


@pytest.mark.parametrize("environment", [{}, {DYNAMO: "INDUCTOR"}, {DYNAMO: "no"}])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_is_compiled_where_the_settings_say_so(compiled, environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = TrainConfig(torchcompile=compiled)
    if environment.get(DYNAMO) == "INDUCTOR" and not compiled:
        with pytest.raises(ApartError, match=DYNAMO):
            make_accelerator(config)
        return
    accelerator = make_accelerator(config)
    prepared = accelerator.prepare(nn.Linear(2, 2))
    assert hasattr(prepared, "_orig_mod") == compiled
    assert accelerator.state.dynamo_plugin.backend.value == ("INDUCTOR" if compiled else "NO")


def test_an_earlier_accelerator_of_the_process_is_seen():
    Accelerator(dynamo_backend="eager")
    with pytest.raises(ApartError, match="made earlier in this process has dynamo backend 'eager'"):
        make_accelerator(TrainConfig())
    with pytest.raises(ApartError, match="mixed_precision='bf16'"):
        make_accelerator(TrainConfig(amp_dtype="bfloat16"))


def test_how_batches_are_shared_out_is_not_read_from_the_environment(monkeypatch):
    for name, value in {"SPLIT_BATCHES": "true", "EVEN_BATCHES": "false", "DISPATCH_BATCHES": "true"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    made = make_accelerator(TrainConfig())
    assert (made.split_batches, made.even_batches, made.dispatch_batches) == (False, True, None)


def test_the_line_of_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(STEPS, "4")
    with pytest.raises(SystemExit) as raised:
        main(["--model", "test_resnet", "--output", str(tmp_path / "runs")])
    error = capsys.readouterr().err
    assert raised.value.code == 2 and error.count("\n") == 1 and f"{STEPS}=4" in error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, used, processes", [("cpu", "cpu", 1), ("cpu:0", "cpu", 1), ("cuda", "cuda:0", 1), ("cuda:1", "cuda:0", 2)]
)
def test_the_device_that_is_asked_for(name, used, processes):
    _check_device(name, SimpleNamespace(device=torch.device(used), num_processes=processes))
    _check_device(None, SimpleNamespace(device=torch.device(used), num_processes=processes))


@pytest.mark.parametrize(
    "name, used, message",
    [
        ("cpu", "cuda:0", "--device cpu: accelerate computes on cuda:0 here; set ACCELERATE_USE_CPU=true, or leave"),
        ("cuda", "cpu", "--device cuda: accelerate computes on cpu here; see nvidia-smi and CUDA_VISIBLE_DEVICES"),
        ("cuda:1", "cuda:0", "--device cuda:1: accelerate computes on cuda:0 here"),
        ("cpu:7", "cpu", "--device cpu:7: the CPU is one device, without a number; use --device cpu"),
        ("gpu", "cpu", "--device gpu: torch knows no such device; cuda and cpu are two"),
        ("", "cpu", "--device : torch knows no such device"),
    ],
)
def test_another_device_is_refused(name, used, message):
    with pytest.raises(ApartError, match=message) as error:
        _check_device(name, SimpleNamespace(device=torch.device(used), num_processes=1))
    assert "\n" not in str(error.value)


def test_a_run_on_the_device_that_is_asked_for(little, tmp_path):
    with pytest.raises(ApartError, match="--device cuda: accelerate computes on cpu here"):
        train(settings(little, tmp_path / "runs", device="cuda"))
    assert not any(tmp_path.iterdir())
    folder = train(settings(little, tmp_path, epochs=1, max_steps=1, device="cpu", checkpoint_every=None))
    assert "device" not in json.loads((folder / "last/config.json").read_text())["apart"]["settings"]
