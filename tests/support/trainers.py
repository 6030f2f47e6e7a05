"""A Trainer over batches in memory, without a run around it."""

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from apart_hf import create_strategy
from apart_hf.training.trainer import Trainer
from tests.support.helpers import batch
from tests.support.oracle import HYPER

SIZE = 8  # of a batch


def trainer(model, data, method="apart", accumulated=1, opt=torch.optim.SGD, hyper=None, cpu=True, **more):
    """Over the batches `data`, each (images, labels), in order; evaluated on another one."""
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=accumulated)
    loaders = [
        torch.utils.data.DataLoader([(image, int(label)) for batch in part for image, label in zip(*batch)], SIZE)
        for part in (data, batches(1))
    ]
    optimizer = opt(model.parameters(), lr=0.01, **({"momentum": 0.9} if opt is torch.optim.SGD else {}))
    model, optimizer, *loaders = accelerator.prepare(model, optimizer, *loaders)
    strategy = create_strategy(method, model, accelerator=accelerator, **HYPER.get(method, {}) | (hyper or {}))
    return Trainer(accelerator, model, strategy, optimizer, None, cross_entropy, *loaders, **more)


def batches(number, bad=()):
    """So many, those numbered `bad` with an infinite pixel."""
    made = [batch(SIZE, seed=k) for k in range(number)]
    for k in bad:
        made[k][0][1, 2, 3, 4] = torch.inf
    return made
