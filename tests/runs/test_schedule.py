"""The learning rate of every schedule is that of timm's scheduler, stepped as timm's script steps it."""

import json

import pytest
import torch
from timm.scheduler import create_scheduler_v2

from apart_hf.config.defaults import fill_defaults
from apart_hf.config.train_config import TrainConfig
from apart_hf.runs.components import make_scheduler
from apart_hf.runs.train import train
from tests.support.settings import settings

UPDATES = 5  # of an epoch
CASES = {
    "step": {"sched": "step", "decay_epochs": 2.4, "decay_rate": 0.97, "warmup_lr": 1e-6},
    "step, by step": {"sched": "step", "decay_epochs": 2.4, "decay_rate": 0.5, "sched_on_updates": True},
    "step, as timm has it": {"sched": "step", "epochs": 100},
    "step, prefix": {"sched": "step", "decay_epochs": 2, "warmup_epochs": 3, "warmup_prefix": True},
    "step, noise": {"sched": "step", "decay_epochs": 2, "lr_noise": [0.42, 0.9], "seed": 7},
    "step, noise to the end": {"sched": "step", "decay_epochs": 2, "lr_noise": [0.3], "lr_noise_std": 0.3},
    "cosine": {"sched": "cosine", "min_lr": 0.01},
    "cosine, by epoch": {"sched": "cosine", "sched_on_updates": False, "warmup_epochs": 2, "warmup_lr": 0.01},
    "cosine, cooldown": {"sched": "cosine", "cooldown_epochs": 3, "min_lr": 0.001},
    "cosine, both": {"sched": "cosine", "cooldown_epochs": 2, "warmup_epochs": 2, "warmup_prefix": True},
    "cosine, noise": {"sched": "cosine", "lr_noise": [0.5], "lr_noise_pct": 0.1},
    "constant": {"sched": "constant", "warmup_epochs": 3},
    "tanh": {"sched": "tanh", "min_lr": 0.001, "cooldown_epochs": 1},
    "poly": {"sched": "poly", "decay_rate": 2.0, "sched_on_updates": True},
    "wsd": {"sched": "wsd", "warmup_epochs": 2},
    "wsd, epochs": {"sched": "wsd", "warmup_epochs": 2, "decay_epochs": 3, "min_lr": 0.01},
    "rsqrt": {"sched": "rsqrt", "warmup_epochs": 2, "sched_on_updates": True},
}


def optimizer():
    return torch.optim.SGD([torch.zeros(1)], lr=0.1)


def rates(config):
    """The learning rate of every step, as the trainer sets it."""
    one = optimizer()
    scheduler = make_scheduler(config, one, UPDATES)
    found = []
    for epoch in range(config.run_epochs):
        if epoch:
            scheduler.step(epoch)
        for step in range(epoch * UPDATES, (epoch + 1) * UPDATES):
            if step:
                scheduler.step_update(step)
            found.append(one.param_groups[0]["lr"])
    return found


def rates_of_timm(on_updates, **arguments):
    """The same by timm's script: it steps after an update, and after an epoch."""
    one, found, updates = optimizer(), [], 0
    scheduler, epochs = create_scheduler_v2(one, step_on_epochs=not on_updates, updates_per_epoch=UPDATES, **arguments)
    for epoch in range(epochs):
        for _ in range(UPDATES):
            found.append(one.param_groups[0]["lr"])
            updates += 1
            scheduler.step_update(updates)
        scheduler.step(epoch + 1)
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_rate_is_timm_s(case):
    given = {"epochs": 10, "lr": 0.1, **CASES[case]}
    config = fill_defaults(TrainConfig(**given))
    on_updates = given.pop("sched_on_updates", given["sched"] == "cosine")
    for key in ("lr", "epochs"):
        given.pop(key)
    noise = {key.removeprefix("lr_"): given.pop(key) for key in list(given) if key.startswith("lr_noise")}
    want = rates_of_timm(
        on_updates, num_epochs=config.epochs, noise_seed=given.pop("seed", 0), **{"warmup_lr": 0.0, **given}, **noise
    )
    found = rates(config)
    assert len(found) == len(want) == config.run_epochs * UPDATES
    assert found == want
    assert len(set(found)) > 1


@pytest.mark.parametrize("on_updates", [None, False])
def test_milestones_are_whole_epochs_after_which_it_falls(on_updates):
    """timm's own fall one epoch, or step, earlier."""
    given = {"sched": "multistep", "epochs": 10, "lr": 0.1, "decay_milestones": [4, 7], "decay_rate": 0.2}
    config = fill_defaults(TrainConfig(sched_on_updates=on_updates, **given))
    want = [0.1] * 4 + [0.02] * 3 + [0.004] * 3
    assert rates(config) == pytest.approx([rate for rate in want for _ in range(UPDATES)])
    if on_updates is False:
        timm = rates_of_timm(False, sched="multistep", num_epochs=10, decay_milestones=[5, 8], decay_rate=0.2)
        assert rates(config) == pytest.approx(timm)


def test_none_is_no_schedule():
    assert make_scheduler(fill_defaults(TrainConfig(sched="none")), optimizer(), UPDATES) is None


def test_a_budget_stretches_the_intervals():
    config = fill_defaults(TrainConfig(sched="step", method="standard", epochs=10, decay_epochs=2.5, budget=2))
    assert (config.epochs, config.decay_epochs) == (20, 5.0)
    config = fill_defaults(TrainConfig(sched="wsd", method="standard", epochs=10, decay_epochs=0.3, budget=2))
    assert (config.epochs, config.decay_epochs) == (20, 0.3)  # a share


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_by_epoch(little, tmp_path):
    given = {"sched": "step", "decay_epochs": 1.5, "decay_rate": 0.5, "warmup_epochs": 1, "warmup_prefix": True}
    folder = train(settings(little, tmp_path, epochs=3, checkpoint_every=None, val_interval=9, **given))
    assert [line["lr"] for line in lines(folder)] == pytest.approx([0.0, 0.02, 0.02, 0.01])
    record = json.loads((folder / "last/config.json").read_text())["apart"]["settings"]
    assert {key: record[key] for key in given} == given


def test_a_run_by_step_with_a_cooldown(little, tmp_path):
    given = {"sched": "cosine", "cooldown_epochs": 1, "min_lr": 0.001}
    folder = train(settings(little, tmp_path, epochs=1, checkpoint_every=None, **given))
    found = [line["lr"] for line in lines(folder)]
    last = 0.001 + 0.019 * 0.5 * (1 + torch.cos(torch.tensor(8 * torch.pi / 9, dtype=torch.float64)).item())
    assert found == pytest.approx([last, 0.001]) and (folder / "last/model.safetensors").exists()
