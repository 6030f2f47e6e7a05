"""Models, trainers and data for tests of transformers' Trainer."""

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel, Trainer
from transformers.modeling_outputs import ImageClassifierOutput

from apart_hf.integrations.transformers import ApartTrainer
from tests.support.helpers import build
from tests.support.loops import SCALE, sgd

COMMON = {
    "max_grad_norm": 0.0,
    "num_train_epochs": 1,
    "train_sampling_strategy": "sequential",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "logging_strategy": "no",
}


class Keywords(PreTrainedModel):
    """A network as transformers has them: it takes keywords and computes its loss."""

    def __init__(self, dtype=torch.float32):
        super().__init__(PreTrainedConfig())
        self.net = build("small", dtype=dtype)

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        return ImageClassifierOutput(None if labels is None else cross_entropy(logits, labels), logits)


class WithItems(Keywords):
    """One whose loss is a sum over the items of a step."""

    def forward(self, pixel_values, labels=None, num_items_in_batch=None, **kwargs):
        output = super().forward(pixel_values, labels)
        if labels is not None and num_items_in_batch is not None:
            output.loss = cross_entropy(output.logits, labels, reduction="sum") / num_items_in_batch
        return output


class Seeded:
    """Seeds the global generator with the number of each batch, and keeps the losses."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.losses = [*vars(self).get("losses", ()), 0.0]
        torch.manual_seed(len(self.losses) - 1)
        self.losses[-1] = super().training_step(model, inputs, *args, **kwargs).item()
        return torch.tensor(self.losses[-1])


class PlainTrainer(Seeded, Trainer):
    pass


class OurTrainer(Seeded, ApartTrainer):
    pass


class Calls:
    count = 0


def rows(parts):
    return [{key: value[k] for key, value in part.items()} for part in parts for k in range(len(part["labels"]))]


def made(kind, model, args, parts, **more):
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return kind(model, args, train_dataset=rows(parts), optimizers=(optimizer, scheduler), **more)


def trained(kind, model, args, parts, **more):
    trainer = made(kind, model, args, parts, **more)
    trainer.train()
    return trainer


def own_loss(model):
    return lambda part: model(**part).loss


def normalised(dtype=torch.float32):
    model = Keywords(dtype)
    model.net.pretrained_cfg = SCALE
    return model


def auxiliary(strategy):
    return {f"own {name}": tensor for name, tensor in strategy.state_dict()["auxiliary"].items()}
