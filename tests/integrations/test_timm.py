"""timm's task with our one line: as its own loop drives it, and, where its path is given, in timm's own script."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from timm.task import LogitDistillationTask
from timm.utils import NativeScaler
from torch.nn.functional import cross_entropy

from apart_hf import ApartError, create_strategy
from apart_hf.integrations.timm import apart
from tests.support.helpers import ROOT, assert_same, batch, build, demo_rows, gradients, snapshot
from tests.support.loops import ADVPROP, CASES, HYPER, SCALE, by_strategy
from tests.support.timm_task import options_of, own_loss, task_of, train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method, ratio", CASES)
def test_bit_equal_to_the_strategy_in_a_plain_loop(method, ratio, dtype):
    parts = [batch(8, 16, seed=k, dtype=torch.float32) for k in range(3)]
    model, plain = (build("small", dtype=torch.float32) for _ in range(2))
    task = apart(task_of(model), method, **options_of(method, ratio))
    losses = train(task, parts, dtype)
    mixed = dtype == torch.bfloat16
    assert losses == by_strategy(plain, method, parts, own_loss(plain), bfloat16=mixed, **options_of(method, ratio))
    assert_same(model.state_dict(), plain.state_dict(), tolerance=0)


def test_images_are_moved():
    parts = [batch(8, 16, seed=k, dtype=torch.float32) for k in range(2)]
    model, plain = (build("small", dtype=torch.float32) for _ in range(2))
    losses = train(apart(task_of(model), "advprop", **ADVPROP, **SCALE), parts)
    assert losses == by_strategy(plain, "advprop", parts, own_loss(plain), **ADVPROP, **SCALE)
    assert_same(model.state_dict(), plain.state_dict(), tolerance=0)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"accumulated": 3},
        {"clip": 0.1, "scaler": True},
        {"dtype": torch.bfloat16, "scaler": True, "accumulated": 2},
    ],
    ids=["plain", "accumulation", "clipping", "all"],
)
def test_standard_is_the_task_unpatched(more):
    found = []
    for patched in (False, True):
        model = build("small", dtype=torch.float32)
        task = apart(task_of(model), "standard") if patched else task_of(model)
        options = more | ({"scaler": NativeScaler("cpu")} if more.get("scaler") else {})
        losses = train(task, [batch(7, 16, seed=k, dtype=torch.float32) for k in range(5)], **options)
        found.append(model.state_dict() | {"losses": torch.tensor(losses)})
    assert_same(*found, tolerance=0)


@pytest.mark.parametrize("method, ratio", CASES)
def test_accumulation_with_a_rest(method, ratio):
    """Five batches, two or three a step, in float64, scaled: within 1e-14 of the strategy in a plain loop."""
    parts = [batch(16, 8, seed=k) for k in range(5)]
    for accumulated in (2, 3):
        model, plain = build("small"), build("small")
        task = apart(task_of(model), method, **options_of(method, ratio))
        train(task, parts, accumulated=accumulated, scaler=NativeScaler("cpu"))
        by_strategy(plain, method, parts, own_loss(plain), accumulated=accumulated, **options_of(method, ratio))
        assert_same(model.state_dict(), plain.state_dict(), tolerance=1e-14)


@pytest.mark.parametrize("ratio", [1, 0.5])
@pytest.mark.parametrize("last", [1, 7, 3])
def test_last_batches_of_any_size(last, ratio, caplog):
    """Bit-equal: one image, a prime number, fewer than groups; with part of the batch as well."""
    parts = [batch(size, 16, seed=k, dtype=torch.float32) for k, size in enumerate((8, 8, last))]
    model, plain = (build("small", dtype=torch.float32) for _ in range(2))
    draws = [{"generator": torch.Generator().manual_seed(3), "groups": 4, "ratio": ratio} for _ in range(2)]
    losses = train(apart(task_of(model), "apart", **draws[0]), parts)
    assert caplog.text.count("Further batches that do not fit") == 1
    assert losses == by_strategy(plain, "apart", parts, own_loss(plain), uneven="fit", **draws[1])
    assert_same(model.state_dict(), plain.state_dict(), tolerance=0)


def test_mixed_targets_and_batches_of_any_size():
    """Soft targets; a last batch that fits no groups is fitted, once said."""
    model, plain = build("small"), build("small")
    task = apart(task_of(model), "apart", groups=4)
    strategy = create_strategy("apart", plain, groups=4, uneven="fit")
    for size in (8, 7, 1, 6):
        x, y = batch(size, 8)
        soft = 0.9 * torch.nn.functional.one_hot(y, 5).double() + 0.02
        task(x, soft)["loss"].backward()
        strategy.accumulate_gradients(x, soft, cross_entropy)
    assert_same(gradients(model), gradients(plain), tolerance=1e-13)
    with pytest.raises(ApartError, match="groups=4 does not divide the 7 samples"):
        apart(task_of(build("small")), "apart", groups=4, uneven="error")(*batch(7, 8))


@pytest.mark.parametrize("in_call", [1, 2])
@pytest.mark.parametrize("method", ["apart", "sam", "apart-sam"])
def test_an_overflow_skips_the_step(method, in_call):
    """In either pass: weights stay, the scaler's factor is halved, and the next step is that of a plain loop."""
    model, plain, calls = build("small", dtype=torch.float32), build("small", dtype=torch.float32), []

    def criterion(output, targets):
        calls.append(1)
        return cross_entropy(output, targets) * (torch.inf if len(calls) == in_call else 1.0)

    parts = [batch(8, 8, seed=k, dtype=torch.float32) for k in range(2)]
    task, scaler = apart(task_of(model, criterion), method, **HYPER[method]), NativeScaler("cpu")
    before, factor = copy.deepcopy(dict(model.named_parameters())), scaler.state_dict()["scale"]
    train(task, parts[:1], scaler=scaler)
    assert_same(dict(model.named_parameters()), before, tolerance=0)
    assert scaler.state_dict()["scale"] == factor / 2
    train(task, parts[1:], scaler=scaler)
    with torch.no_grad():
        plain(parts[0][0])  # running statistics have seen the batch
    by_strategy(plain, method, parts[1:], own_loss(plain), **HYPER[method])
    assert_same(model.state_dict(), plain.state_dict(), tolerance=1e-6)
    assert not torch.equal(model.fc.weight, before["fc.weight"])


@pytest.mark.parametrize("method", ["standard", "apart", "sam"])
def test_evaluation_and_what_is_returned(method):
    model, (x, y) = build("small"), batch(8, 8)
    task = apart(task_of(model), method, **HYPER[method])
    result = task(x, y)
    assert list(result) == ["loss", "output"] and result["loss"].requires_grad and not result["output"].requires_grad
    for off, training in ((True, True), (False, False)):
        model.train(training)
        want = task_of(copy.deepcopy(model))
        with torch.set_grad_enabled(not off):
            result, other = task(x, y), want(x, y)
        assert (
            torch.equal(result["loss"], other["loss"])
            and result["output"].requires_grad == other["output"].requires_grad
        )


@pytest.mark.parametrize("fails_in_call", [None, 1, 2])
def test_nothing_is_left_on_the_model(fails_in_call):
    model, calls = build("small"), []

    def criterion(output, targets):
        calls.append(1)
        if len(calls) == fails_in_call:
            raise RuntimeError("of the user")
        return cross_entropy(output, targets)

    task = task_of(model, criterion)
    before, keys = snapshot(model), list(task.state_dict())
    apart(task, "apart-sam", groups=2)
    if fails_in_call is None:
        task(*batch(8, 8))["loss"].backward()
    else:
        with pytest.raises(RuntimeError, match="of the user"):
            task(*batch(8, 8))
    assert snapshot(model) == before and list(task.state_dict()) == keys and task.get_trainable_module() is model


def test_the_student_is_attacked_and_the_teacher_is_not():
    student, teacher = (timm.create_model("test_resnet", num_classes=5, img_size=None) for _ in range(2))
    student.double(), teacher.double()
    x, y = batch(8, 32)

    def make(model):
        criterion = torch.nn.CrossEntropyLoss()
        return LogitDistillationTask(model, teacher, criterion, dtype=torch.float64, verbose=False)

    plain = copy.deepcopy(student)
    task, before = apart(make(student), "apart", groups=2), copy.deepcopy(teacher.state_dict())
    result = task(x, y)
    result["loss"].backward()
    assert {"task_loss", "kd_loss"} <= set(result) and not result["kd_loss"].requires_grad
    other = make(plain)
    create_strategy("apart", plain, groups=2).accumulate((x, y), lambda part: other(*part)["loss"])
    assert_same(gradients(student), gradients(plain), tolerance=0)
    assert_same(teacher.state_dict(), before, tolerance=0)


def test_compiled_and_wrapped_afterwards(tmp_path):
    """The order of the script: our line, then the average of the weights, compile, DDP."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, plain, parts = build("small"), build("small"), [batch(8, 8, seed=k) for k in range(2)]
        task = apart(task_of(model), "apart", groups=2, every=2)
        task.setup_ema(decay=0.5)
        task(*parts[0])["loss"].backward()
        model.zero_grad()
        task.compile(backend="eager")
        task.prepare_distributed()
        task(*parts[1])["loss"].backward()
        task.update_ema(step=1)
        wrapped = task.get_trainable_module()
        assert type(wrapped).__name__ == "DistributedDataParallel" and task.forward.loss.strategy.steps == 2
        strategy = create_strategy("apart", plain, groups=2, every=2)
        for x, y in parts:
            plain.zero_grad()
            strategy.accumulate_gradients(x, y, cross_entropy)
        assert_same(gradients(model), gradients(plain), tolerance=1e-14)
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()


def test_misuse():
    model = build("small")
    with pytest.raises(ApartError, match=r"takes a task of timm\.task, and was given an object of type SmallNet"):
        apart(model, "apart")
    task = apart(task_of(model), "apart")
    with pytest.raises(ApartError, match="call apart once"):
        apart(task, "sam")
    with pytest.raises(ApartError, match="did you mean 'apart'"):
        apart(task_of(model), "aprat")
    with pytest.raises(ApartError, match="has no BatchNorm layer"):
        apart(task_of(timm.create_model("test_vit")), "apart")
    for option, message in (
        ({"groupz": 4}, "no hyper-parameter 'groupz'"),
        ({"model": model}, "model= is not taken here: the task has it"),
        ({"criterion": cross_entropy}, "criterion= is not taken here: the task has it"),
        ({"autocast": torch.no_grad}, "autocast= is not taken here: both passes take the autocast that the script"),
        ({"accelerator": 1}, "accelerator= is not taken here: timm's script has its own scaler"),
        ({"generator": 1}, "generator=1 is of type int"),
    ):
        task = task_of(model)
        with pytest.raises(ApartError, match=message):
            apart(task, "apart", **option)
        assert "forward" not in vars(task)
    for criterion in (torch.nn.CrossEntropyLoss(reduction="sum"), partial(cross_entropy, reduction="sum")):
        with pytest.raises(ApartError, match="reduction='sum', and the two passes weight means"):
            apart(task_of(model, criterion), "sam")
        apart(task_of(model, criterion), "standard")


def run_script(text, folder, name, images):
    script = folder / f"{name}.py"
    script.write_text(text)
    flags = (
        "--model test_resnet --epochs 1 -b 24 --opt momentum --lr 0.02 --warmup-epochs 0 --workers 0 --no-aug --seed 1"
    )
    command = [sys.executable, script, "--data-dir", images, *flags.split(), "--num-classes", "10", "--device", "cpu"]
    command += ["--output", folder / "out", "--experiment", name, "--val-split", "val"]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(folder / "out" / name / "last.pth.tar", weights_only=False)
    return found["state_dict"], done.stderr


@pytest.mark.process
@pytest.mark.skipif("TIMM_TRAIN" not in os.environ, reason="TIMM_TRAIN=path/to/timm's/train.py names the script")
def test_timm_s_own_script(tmp_path):
    """`standard` by the added line equals the script as it is; apart trains on, also on the last batch of 16."""
    script = Path(os.environ["TIMM_TRAIN"]).read_text()
    place = "    model = task.get_trainable_module()\n    eval_model"
    assert script.count(place) == 1
    for split, count in (("train", 64), ("val", 16)):
        for number, row in enumerate(demo_rows("train").select(range(count))):
            path = tmp_path / "images" / split / str(row["label"] if split == "train" else number % 10)
            path.mkdir(parents=True, exist_ok=True)
            row["image"].convert("RGB").resize((64, 64)).save(path / f"{number}.png")
    states = {}
    for name, added in (
        ("as it is", ""),
        ("standard", '    task = apart(task, "standard")\n'),
        ("apart", '    task = apart(task, "apart", groups=24, ratio=0.5)\n'),
    ):
        text = script.replace(place, added + place)
        if added:
            text = text.replace(
                "from timm.task import (", "from apart_hf.integrations.timm import apart\nfrom timm.task import (", 1
            )
        states[name], said = run_script(text, tmp_path, name.replace(" ", "-"), tmp_path / "images")
    assert_same(states["standard"], states["as it is"], tolerance=0)
    assert "takes groups=" in said
    assert any(not torch.equal(states["apart"][key], value) for key, value in states["standard"].items())
