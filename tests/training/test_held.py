"""What a strategy holds is trained like the model: judged, left alone by a bad step, and clipped in one norm."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from apart_hf.training.clipping import clip_gradients
from tests.support.helpers import assert_same, build
from tests.support.trainers import batches, trainer

HYPER = {"steps": 1, "aux_affine": True, "mean": [0.5], "std": [0.5]}


def made(model, data, **more):
    one = trainer(copy.deepcopy(model), data, "advprop", hyper=HYPER, **more)
    one.optimizer.add_param_group({"params": list(one.strategy.parameters())})
    return one


def held(one):
    return {str(i): t.detach().double() for i, t in enumerate((*one.strategy.parameters(), *one.strategy.buffers()))}


def test_a_step_that_is_left_out_leaves_no_trace():
    model, data = build("small"), batches(5, bad=[3])
    runs = [made(model, part, skip_nonfinite=True) for part in (data, data[:3] + data[4:])]
    found = [next(iter(run.fit(1))).as_line()["skipped_steps"] for run in runs]
    assert found == [1, 0]
    assert_same(*(held(run) for run in runs), tolerance=0)
    assert_same(*(run.model.state_dict() for run in runs), tolerance=0)
    before = held(made(model, data))
    assert all(not torch.equal(before[key], value) for key, value in held(runs[0]).items())


def test_a_gradient_of_theirs_that_is_not_finite_is_a_bad_step():
    one = made(build("small"), batches(1), skip_nonfinite=True)
    accumulate = one.strategy.accumulate_gradients

    def spoilt(*arguments, **options):
        result = accumulate(*arguments, **options)
        next(one.strategy.parameters()).grad[0] = torch.nan
        return result

    one.strategy.accumulate_gradients = spoilt
    before = {name: value.clone() for name, value in held(one).items()}
    one.guard.before()
    images, labels = batches(1)[0]
    one.train_step(images, labels)
    assert not one.guard.good
    assert_same(held(one), before, tolerance=0)


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_they_are_clipped_with_the_model(mode):
    model, extra = nn.Linear(4, 3), nn.Parameter(torch.ones(5))
    optimizer = torch.optim.SGD([*model.parameters(), extra], lr=0.1)
    for p in (*model.parameters(), extra):
        p.grad = torch.full_like(p, 2.0)
    clip_gradients(Accelerator(cpu=True), model, optimizer, 0.5, mode, [extra])
    if mode == "norm":
        whole = torch.cat([p.grad.flatten() for p in (*model.parameters(), extra)])
        torch.testing.assert_close(whole.norm(), torch.tensor(0.5), rtol=1e-4, atol=0)
    else:
        assert extra.grad.max() <= 0.5
