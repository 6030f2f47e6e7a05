"""Tasks of timm, and a loop that trains by them as timm's script does."""

import torch
from timm.task import ClassificationTask
from torch.nn.functional import cross_entropy

from tests.support.loops import hyper_of


def options_of(method, ratio):
    return {"generator": torch.Generator().manual_seed(3)} | hyper_of(method, ratio)


def task_of(model, criterion=None):
    return ClassificationTask(model, criterion or torch.nn.CrossEntropyLoss(), verbose=False)


def train(task, parts, dtype=torch.float32, accumulated=1, clip=None, scaler=None):
    """What timm's train_one_epoch does with a task; the loss is divided in place, as there."""
    model = task.get_trainable_module()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for number, (x, y) in enumerate(parts, start=1):
        last_step = len(parts) - len(parts) % accumulated
        share = accumulated if number <= last_step else len(parts) - last_step
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            result = task(x, y)
            loss = result["loss"]
        if share > 1:
            loss /= share
        needs_update = number % accumulated == 0 or number == len(parts)
        clips = {"clip_grad": clip, "parameters": list(model.parameters()) if clip else None}
        if scaler is not None:
            scaler(loss, optimizer, need_update=needs_update, **clips)
        else:
            loss.backward()
            if needs_update:
                optimizer.step()
        losses.append(loss.item() * share)
        if needs_update:
            optimizer.zero_grad()
    return losses


def own_loss(model):
    return lambda part: cross_entropy(model(part[0]), part[1])
