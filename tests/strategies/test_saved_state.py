"""What a saved state says of its strategy: another method is refused, and other values are said once."""

import copy
import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from apart_hf import METHODS, ApartError, create_loss, create_strategy
from tests.support.helpers import batch, build
from tests.support.oracle import FAMILY


def make(way, method, **hyper):
    if way == "strategy":
        return create_strategy(method, build("small"), **hyper)
    return create_loss(method, build("small"), lambda model, part: cross_entropy(model(part[0]), part[1]), **hyper)


def warnings_of(caplog):
    found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return found


@pytest.mark.parametrize("way", ["strategy", "loss"])
def test_methods_with_the_same_hyper_parameters(way):
    """sam-on took sam's state, with its radius, without a word."""
    by_names = {}
    for method in METHODS:
        by_names.setdefault(tuple(METHODS[method].hyper_parameters()), []).append(method)
    twins = [(a, b) for names in by_names.values() for a in names for b in names if a != b]
    assert ("sam", "sam-on") in twins
    for saved, other in twins:
        state, goes_on = make(way, saved).state_dict(), make(way, other)
        before = goes_on.state_dict()
        with pytest.raises(ApartError, match=f"of the method '{saved}', and goes on with '{other}'") as error:
            goes_on.load_state_dict(state)
        assert "\n" not in str(error.value) and goes_on.state_dict() == before
        state.pop("name")  # as earlier versions kept it
        goes_on.load_state_dict(state)


@pytest.mark.parametrize("way", ["strategy", "loss"])
def test_uneven_is_kept(way):
    one, other = make(way, "apart", groups=4, uneven="fit"), make(way, "apart", groups=4)
    other.load_state_dict(one.state_dict())
    assert getattr(other, "strategy", other).uneven == "fit"
    earlier = {key: value for key, value in one.state_dict().items() if key in ("steps", "every", "hyper")}
    third = make(way, "apart", groups=4, uneven="plain")
    third.load_state_dict(earlier)
    assert getattr(third, "strategy", third).uneven == "plain"


@pytest.mark.parametrize("way", ["strategy", "loss"])
def test_other_values_are_said(way, caplog):
    """One line with both values, where the strategy that goes on was made with others than the one that was saved."""
    saved = make(way, "apart-sam", epsilon=0.1, groups=4, every=2)
    state = json.loads(json.dumps(saved.state_dict()))
    same = make(way, "apart-sam", epsilon=0.1, groups=4, every=2)
    same.load_state_dict(copy.deepcopy(state))
    assert warnings_of(caplog) == []
    other = make(way, "apart-sam", epsilon=0.4, groups=4, uneven="fit")
    other.load_state_dict(state)
    (said,) = warnings_of(caplog)
    assert "\n" not in said and said.startswith(
        "apart-sam goes on with epsilon=0.1, every=2, uneven='error', as its saved state has it, and not with "
        "epsilon=0.4, every=1, uneven='fit', as given; strategy.set(epsilon=0.4, "
    )
    strategy = getattr(other, "strategy", other)
    assert (strategy.hyper["epsilon"], strategy.every, strategy.uneven) == (0.1, 2, "error")
    other.load_state_dict(saved.state_dict())  # it is now what was made with 0.1
    assert warnings_of(caplog) == []
    again = make(way, "apart-sam", epsilon=0.4, groups=4, every=2)
    again.load_state_dict(other.state_dict())  # kept through a second run, which had the state's values
    assert "epsilon=0.4, as given" in warnings_of(caplog)[0]


@pytest.mark.parametrize("way", ["strategy", "loss"])
def test_a_schedule_is_no_contradiction(way, caplog):
    one = make(way, "apart", epsilon=0.1)
    one.set(epsilon=0.03, every=4)
    other = make(way, "apart", epsilon=0.1)
    other.load_state_dict(one.state_dict())
    assert warnings_of(caplog) == [] and getattr(other, "strategy", other).hyper["epsilon"] == 0.03
    third = make(way, "apart", epsilon=0.2)
    third.load_state_dict(one.state_dict())
    assert "goes on with epsilon=0.03, as its saved state has it, and not with epsilon=0.2" in warnings_of(caplog)[0]


def test_states_of_earlier_versions_say_what_was_in_use(caplog):
    """They do not tell a schedule from what was given."""
    earlier = {"steps": 3, "every": 1, "hyper": {"rho": 0.05, "global_norm": False}}
    strategy = create_strategy("sam", build("small"), rho=0.2)
    strategy.load_state_dict(earlier)
    assert "rho=0.05" in warnings_of(caplog)[0] and strategy.steps == 3
    create_strategy("sam", build("small")).load_state_dict(earlier)
    generator = torch.Generator()
    create_strategy("sam", build("small"), rho=0.2, generator=generator).load_state_dict(
        {"generator": generator.get_state()}
    )
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("method", ["advprop", "fast-advprop", "advbn"])
def test_a_loss_of_the_model_in_another_form_trains_the_same_parameters(method):
    """Those that an optimizer was given; running statistics and values go on, too."""

    def loss_fn(model, part):
        return cross_entropy(model(part[0]), part[1])

    model, data = build("small", dtype=torch.float32), batch(8, 12, dtype=torch.float32)
    one = create_loss(method, model, loss_fn, **FAMILY[method])
    optimizer = torch.optim.SGD([*model.parameters(), *one.strategy.parameters()], lr=0.1)
    one(data).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = [p.detach().clone() for p in one.strategy.parameters()]
    other = create_loss(method, torch.compile(model, backend="eager"), loss_fn, **FAMILY[method])
    other.go_on_from(one)
    own = list(other.strategy.parameters())
    assert own and all(a is b for a, b in zip(own, one.strategy.parameters()))
    for a, b in zip(other.strategy.buffers(), one.strategy.buffers()):
        assert torch.equal(a, b)
    other(data).backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(own, before))
    torch._dynamo.reset()
