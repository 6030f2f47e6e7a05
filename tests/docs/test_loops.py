"""The pages on other people's loops are true: their code runs, and their diff fits."""

import re

import pytest
import timm
import torch
import transformers
from accelerate import Accelerator
from timm.task import ClassificationTask

from apart_hf import create_strategy
from tests.support.helpers import ROOT, assert_same, forget_accelerator

LOOPS, TIMM = ((ROOT / "docs" / name).read_text() for name in ("LOOPS.md", "TIMM.md"))


A_STRATEGY, A_LOSS, BY_HAND, IGNITE, AUXILIARY = re.findall(r"```python\n(.*?)```", LOOPS, re.S)
QUIET = {f"enable_{part}": False for part in ("checkpointing", "progress_bar", "model_summary")}


@pytest.mark.parametrize("code", [A_STRATEGY, A_LOSS], ids=["a strategy", "a loss"])
def test_the_loop_runs(code):
    scope = {}
    exec(code, scope)
    assert scope["loss"].isfinite()


def test_the_parameters_of_the_strategy_are_trained():
    scope = {}
    exec(AUXILIARY, scope)
    held = list(scope["strategy"].parameters())
    before = [p.detach().clone() for p in held]
    scope["strategy"].accumulate_gradients(torch.randn(8, 3, 32, 32), torch.arange(8), torch.nn.CrossEntropyLoss())
    scope["optimizer"].step()
    assert any(not torch.equal(p, old) for p, old in zip(held, before))


def added(section):
    """What a diff of the page adds, beside what it leaves as it is."""
    text = re.search(rf"^## {section}$.*?```diff\n(.*?)```", LOOPS, re.M | re.S)[1]
    return "\n".join(line[1:] for line in text.splitlines() if not line.startswith("-"))


def images(count=16):
    return [(torch.randn(3, 32, 32), k % 10) for k in range(count)]


def test_transformers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10)
    scope = {"model": transformers.ResNetForImageClassification(config)}
    scope["data"] = [{"pixel_values": image, "labels": label} for image, label in images()]
    exec(added("transformers"), scope)
    scope["trainer"].train()
    strategy = scope["trainer"].strategy
    assert str(strategy) == "apart(epsilon=0.1, groups=4, ratio=1.0)" and strategy.steps == 2


def test_lightning(tmp_path, monkeypatch):
    """The callback for a module that optimizes automatically; the other recipe makes the same steps by hand."""
    monkeypatch.chdir(tmp_path)
    scope, found = {}, []
    exec(BY_HAND, scope)

    class Automatic(scope["Module"]):
        automatic_optimization = True

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(images(), batch_size=8)
    for kind in (Automatic, scope["Module"]):
        torch.manual_seed(0)
        module, code = kind(), added("Lightning")
        if kind is scope["Module"]:
            code = re.sub(r"callbacks=\[.*\]", "", code)
        exec(
            code.replace("Trainer(", "Trainer(logger=False, accelerator='cpu', **quiet, "), {"quiet": QUIET} | locals()
        )
        found.append(module.state_dict())
    assert_same(*found, tolerance=0)


def test_accelerate():
    forget_accelerator()
    scope = {"accelerator": Accelerator(cpu=True), "model": timm.create_model("test_resnet", num_classes=10)}
    scope["optimizer"] = torch.optim.SGD(scope["model"].parameters(), lr=0.1)
    scope["loader"] = torch.utils.data.DataLoader(images(), batch_size=8)
    scope["loss_fn"] = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    exec(added("accelerate"), scope)
    assert scope["compute_loss"].strategy.steps == 2


@pytest.fixture
def ignite():
    return pytest.importorskip("ignite", reason="ignite is in no extra: pip install pytorch-ignite")


IGNITE_HYPER = {
    "apart": {"epsilon": 0.1, "groups": 4},
    "apart-sam": {"epsilon": 0.1, "groups": 2, "rho": 0.2, "ratio": 0.5},
}


def by_ignite(method):
    """The document's code, by a method with its hyper-parameters."""
    scope = {"generator": torch.Generator().manual_seed(5)}
    before, call = IGNITE.split("trainer.run(")
    hyper = ", ".join(f"{name}={value}" for name, value in IGNITE_HYPER[method].items())
    assert before.count('create_loss("apart", ') == before.count("epsilon=0.1, groups=4") == 1
    code = before.replace('create_loss("apart", ', f'create_loss("{method}", ')
    torch.manual_seed(0)
    exec(code.replace("epsilon=0.1, groups=4", f"{hyper}, generator=generator"), scope)
    return scope, f"trainer.run({call}"


@pytest.mark.parametrize("method", IGNITE_HYPER)
def test_ignite(method, ignite):
    scope, run = by_ignite(method)
    exec(run, scope)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(5)
    strategy = create_strategy(method, model, generator=generator, **IGNITE_HYPER[method])
    for x, y in scope["loader"]:
        strategy.accumulate_gradients(x, y, torch.nn.CrossEntropyLoss())
        optimizer.step()
        optimizer.zero_grad()
    assert_same(scope["model"].state_dict(), model.state_dict(), tolerance=0)


def test_ignite_s_checkpoints_keep_the_state(ignite, tmp_path):
    """Cut off after the first of two epochs, where draws go on."""
    from ignite.engine import Events
    from ignite.handlers import Checkpoint, DiskSaver

    whole, _ = by_ignite("apart-sam")
    parts = {name: whole[name] for name in ("model", "optimizer", "trainer", "compute_loss")}
    keeper = Checkpoint(parts, DiskSaver(str(tmp_path), require_empty=False), filename_pattern="{name}.pt")
    whole["trainer"].add_event_handler(Events.EPOCH_COMPLETED(once=1), keeper)
    whole["trainer"].run(whole["loader"], max_epochs=2)
    again, _ = by_ignite("apart-sam")
    torch.manual_seed(9)
    again["model"].load_state_dict(timm.create_model("test_resnet", num_classes=10).state_dict())
    again["compute_loss"].strategy.generator.manual_seed(9)
    (file,) = tmp_path.glob("*.pt")
    Checkpoint.load_objects({name: again[name] for name in parts}, torch.load(file, weights_only=False))
    assert again["compute_loss"].strategy.steps == again["trainer"].state.iteration == 2
    again["trainer"].run(whole["loader"], max_epochs=2)
    assert again["compute_loss"].strategy.steps == whole["compute_loss"].strategy.steps == 4
    assert_same(again["model"].state_dict(), whole["model"].state_dict(), tolerance=0)


def test_the_line_of_the_diff_runs():
    lines = [line[1:].strip() for line in TIMM.splitlines() if re.match(r"\+(?!\+\+)", line)]
    assert len(lines) == 2

    scope = {"task": ClassificationTask(timm.create_model("test_resnet"), verbose=False)}
    exec("\n".join(lines), scope)
    assert str(scope["task"].forward.loss.strategy) == "apart(epsilon=0.1, groups=16, ratio=1.0)"
