"""What tests of other people's loops compare with: the strategy in a plain loop."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch.nn.functional import cross_entropy

from apart_hf import create_strategy
from tests.support.helpers import batch

HYPER = {
    "standard": {},
    "apart": {"groups": 2},
    "sam": {"rho": 0.1},
    "apart-sam": {"groups": 2, "rho": 0.2},
    "random-bn": {"groups": 2},
}
ADVPROP = {"steps": 2, "pixel_epsilon": 2.0}  # beside them; images of the tests are told their scale
SCALE = {"mean": [0.5, 0.4, 0.6], "std": [0.3, 0.25, 0.2]}
CASES = [(method, ratio) for method in HYPER for ratio in (1, 0.5) if ratio == 1 or HYPER[method].get("groups")]


def hyper_of(method, ratio):
    return HYPER.get(method, {}) | ({} if ratio == 1 else {"ratio": ratio})


def hyper_on_ranks(method):
    """Of the methods that are compared in two processes."""
    if method == "advprop":
        return {**ADVPROP, "aux_affine": True}
    return hyper_of(method, 0.5 if HYPER[method] else 1)


def batches(*sizes, dtype=torch.float32):
    """Batches of 16 pixels as models of transformers take them."""
    parts = [batch(size, 16, seed=k, dtype=dtype) for k, size in enumerate(sizes)]
    return [{"pixel_values": x, "labels": y} for x, y in parts]


def sgd(model, own=()):
    return torch.optim.SGD([*model.parameters(), *own], lr=0.05, momentum=0.9)


def divided(loss, count):
    (loss / count).backward()


def by_strategy(model, method, parts, loss_fn, *, bfloat16=False, accumulated=1, counted=None, **options):
    """Losses of training in a plain loop; before each batch the global generator is seeded with its number.

    `counted` is what the loss of a batch is divided by, where it is not the number of batches in the step.
    """
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=bfloat16)
    strategy = create_strategy(method, model, autocast=autocast, **options)
    optimizer, losses = sgd(model, strategy.parameters()), []
    for start in range(0, len(parts), accumulated):
        step = parts[start : start + accumulated]
        for number, part in enumerate(step, start):
            torch.manual_seed(number)
            backward, is_last = partial(divided, count=counted or len(step)), part is step[-1]
            with getattr(model, "no_sync", nullcontext)() if not is_last else nullcontext():
                loss, _ = strategy.accumulate(part, loss_fn, backward=backward, ends_step=is_last)
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def loss_and_output(model, part):
    """The loss function of tests of `create_loss`, with an auxiliary output."""
    output = model(part["x"])
    return cross_entropy(output, part["y"]), output
