"""An auxiliary gamma and beta in optimizers that others have made: in which group, how often, and by which name."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from apart_hf import create_strategy
from apart_hf.integrations.own_parameters import join_groups
from tests.support.helpers import assert_same, batch, build
from tests.support.loops import ADVPROP, SCALE


def strategy_of(model, **hyper):
    return create_strategy("advprop", model, **ADVPROP, **SCALE, **{"aux_affine": True, **hyper})


def own_by_name(strategy):
    return dict(strategy.perturbations[1].named_parameters())


@pytest.mark.parametrize("times", [1, 2])
def test_names_are_kept_beside_parameters(times):
    """Optimizers that were given named parameters write the names into their state."""
    strategy = strategy_of(build("small"))
    groups = [
        {"params": [one for one in strategy.model.named_parameters() if ("bn1" in one[0]) == first]}
        for first in (True, False)
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for _ in range(times):
        join_groups([optimizer], strategy)
    by_name = dict(strategy.model.named_parameters())
    by_name |= {f"auxiliary.{name}": p for name, p in own_by_name(strategy).items()}
    for group, layer in zip(optimizer.param_groups, ("bn1", "bn2")):
        assert len(group["params"]) == len(group["param_names"])
        assert all(by_name[name] is p for name, p in zip(group["param_names"], group["params"]))
        found = {name for name in group["param_names"] if name.startswith("auxiliary.")}
        assert found == {f"auxiliary.{layer}.weight", f"auxiliary.{layer}.bias"}
    assert len(optimizer.state_dict()["param_groups"][0]["params"]) == 4


def test_what_no_optimizer_has_stays_out_and_each_joins_the_optimizer_of_its_own():
    model = build("small")
    strategy = strategy_of(model)
    first, second = torch.optim.SGD([model.bn1.weight], lr=0.1), torch.optim.AdamW([model.bn2.bias, model.fc.weight])
    join_groups([first, second], strategy)
    own = own_by_name(strategy)
    wanted = [model.bn1.weight, own["bn1.weight"]], [model.bn2.bias, model.fc.weight, own["bn2.bias"]]
    for optimizer, params in zip((first, second), wanted):
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in params]


def test_without_any_groups_stay_as_they_are():
    strategy = strategy_of(build("small"), aux_affine=False)
    optimizer = torch.optim.SGD(strategy.model.parameters(), lr=0.1)
    before = list(optimizer.param_groups[0]["params"])
    join_groups([optimizer], strategy)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], before, strict=True))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS])
def test_optimizers_train_what_has_joined_as_what_they_were_made_with(kind):
    """LBFGS, which keeps the list of its parameters, too."""
    found = []
    for joins in (False, True):
        strategy = strategy_of(build("small"))
        own = list(strategy.parameters())
        optimizer = kind([*strategy.model.parameters(), *([] if joins else own)], lr=0.01)
        before = [p.detach().clone() for p in own]
        if joins:
            join_groups([optimizer], strategy)
        for seed in range(2):

            def closure(strategy=strategy, optimizer=optimizer, seed=seed):
                optimizer.zero_grad()
                return strategy.accumulate_gradients(*batch(8, 12, seed=seed), cross_entropy)[0]

            optimizer.step(closure)
        assert not any(torch.equal(a, b) for a, b in zip(before, own))
        found.append(dict(enumerate((*strategy.model.parameters(), *own))))
    assert_same(found[1], found[0], tolerance=1e-12)
