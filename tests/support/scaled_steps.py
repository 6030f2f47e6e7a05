"""Three steps under torch's gradient scaler, beside the same steps without one."""

import copy

import torch

from tests.support.helpers import assert_same, batch, build


def check_steps_under_a_scaler(make, bad):
    """Steps are those without a scaler, bit for bit; an overflow in pass `bad` skips one, and lowers the scale.

    `make(model, factor, scaler)` gives a function of a batch that fills the gradients by scaled losses, each multiplied
    by `factor()`, and the parameters that are trained beside the model's.
    """
    found = []
    for scaled in (False, True):
        model, calls = build("small", dtype=torch.float32), []
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)

        def factor(calls=calls):
            calls.append(1)
            return torch.inf if len(calls) == bad else 1.0

        backward, own = make(model, factor, scaler)
        optimizer = torch.optim.SGD([*model.parameters(), *own], lr=0.05)

        def everything(model=model, own=own):
            return copy.deepcopy({**model.state_dict(), **{f"own {i}": p.detach() for i, p in enumerate(own)}})

        states = [everything()]
        for step in range(3):
            backward(*batch(8, 8, seed=step, dtype=torch.float32))
            if scaled:
                scaler.step(optimizer)
                scaler.update()
            elif step or bad is None:
                optimizer.step()
            optimizer.zero_grad()
            states.append(everything())
        found.append(states)
    for one, two in zip(*found):
        assert_same(one, two, tolerance=0)
    moved = not torch.equal(found[1][0]["fc.weight"], found[1][1]["fc.weight"])
    assert moved == (bad is None) and scaler.get_scale() == 2.0 ** (10 if bad is None else 9)
