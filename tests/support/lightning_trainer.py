"""Modules, loaders and a Trainer for tests of Lightning."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch.nn.functional import cross_entropy

from tests.support.helpers import build
from tests.support.loops import sgd


class Module(LightningModule):
    """Seeds the global generator with the number of each batch, and keeps the losses."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.net, self.said = build("small", dtype=dtype), []

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(batch_idx)

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.net(batch["pixel_values"]), batch["labels"])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("eval_loss", cross_entropy(self.net(batch["pixel_values"]), batch["labels"]), batch_size=8)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if outputs:
            self.said.append(outputs["loss"].item())

    def configure_optimizers(self):
        return sgd(self.net)


class Resumable:
    """A loader that goes on where it was, as Lightning asks of one within an epoch."""

    def __init__(self, parts):
        self.parts, self.next = parts, 0

    def __len__(self):
        return len(self.parts)

    def __iter__(self):
        torch.empty(()).random_()  # as a DataLoader does
        self.next %= len(self.parts)
        while self.next < len(self.parts):
            self.next += 1
            yield self.parts[self.next - 1]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


class Scheduled(Module):
    """Has a scheduler, and normalisation layers in a group of their own."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(by_groups(self.net), lr=0.05, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]


def by_groups(net, own=()):
    """SGD's groups: weights of convolutions and the head; then gamma, beta and what is `own`, with a rate of theirs."""
    norms = [p for name, p in net.named_parameters() if "bn" in name]
    others = [p for name, p in net.named_parameters() if "bn" not in name]
    return [{"params": others, "weight_decay": 0.01}, {"params": [*norms, *own], "lr": 0.2}]


class Memory(Logger):
    """Keeps what is logged, through Lightning and past it."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.lines, self.direct = [], []

    @property
    def experiment(self):
        return self.direct

    def log_metrics(self, metrics, step=None):
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Calls:
    count = 0


def loaders(parts, **more):
    return torch.utils.data.DataLoader(parts, batch_size=None, **more)


def trainer_of(*callbacks, **more):
    options = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "log_every_n_steps": 1}
    options |= {f"enable_{part}": False for part in ("checkpointing", "progress_bar", "model_summary")}
    return Trainer(callbacks=list(callbacks), **options | more)


def fit(module, parts, *callbacks, path=None, shuffle=False, resumable=False, **more):
    trainer = trainer_of(*callbacks, **more)
    trainer.fit(module, Resumable(parts) if resumable else loaders(parts, shuffle=shuffle), ckpt_path=path)
    assert "training_step" not in vars(trainer.strategy)
    return trainer


def saving(path, at):
    """Lightning's own callback, within an epoch or at its end."""
    when = {"every_n_epochs": 1} if at == 6 else {"every_n_train_steps": at}
    return ModelCheckpoint(path, filename="{step}", save_top_k=-1, **when)


def own_loss(net):
    return lambda part: cross_entropy(net(part["pixel_values"]), part["labels"])


def auxiliary(strategy):
    return {f"own {name.removeprefix('net.')}": t for name, t in strategy.state_dict()["auxiliary"].items()}
