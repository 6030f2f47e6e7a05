"""Hyper-parameters that change between steps, the count of steps, and what is kept of both."""

import copy
import json
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from apart_hf import METHODS, ApartError, Method, Perturbation, create_loss, create_strategy
from apart_hf.strategies.bn_perturbations import AdversarialStatistics
from apart_hf.strategies.weight_perturbations import AdaptiveWeights
from tests.support.helpers import assert_same, batch, build, gradients
from tests.support.oracle import HYPER


def loss_fn(model, part):
    return cross_entropy(model(part[0]), part[1])


class Counted:
    """A strategy, or a loss, over a model whose forwards are counted."""

    def __init__(self, way, method, accelerator=None, **hyper):
        self.model, self.way, self.forwards = build("small"), way, 0
        self.model.register_forward_hook(self._count)
        if way == "strategy":
            self.taken = create_strategy(method, self.model, accelerator=accelerator, **hyper)
        else:
            self.taken = create_loss(method, self.model, loss_fn, **hyper)

    def _count(self, *_):
        self.forwards += 1

    def step(self, seed=0, **more):
        """Returns the number of its passes."""
        before, part = self.forwards, batch(8, 8, seed=seed)
        self.model.zero_grad()
        if self.way == "strategy":
            self.taken.accumulate_gradients(*part, cross_entropy, **more)
        else:
            self.taken(part, **more).backward()
        return self.forwards - before


@pytest.mark.parametrize("way", ["strategy", "loss"])
@pytest.mark.parametrize("method", ["apart", "sam"])
def test_every_third_step_has_a_second_pass(method, way):
    one = Counted(way, method, every=3, **HYPER[method])
    assert [one.step() for _ in range(7)] == [1, 1, 2, 1, 1, 2, 1]
    assert [one.step(ends_step=False) for _ in range(2)] + [one.step()] == [1, 1, 1]  # batches of one step, the eighth
    assert [one.step(ends_step=False) for _ in range(2)] + [one.step()] == [2, 2, 2]  # of the ninth
    assert one.step(perturb=False) == 1 and one.step() == 1 and one.step(perturb=False) == 1  # it counts, all the same
    assert [one.step() for _ in range(3)] == [1, 1, 2]


def test_an_accelerator_tells_where_a_step_ends():
    class Accelerator:
        sync_gradients = False

        def backward(self, loss):
            loss.backward()

    accelerator = Accelerator()
    one, passes = Counted("strategy", "apart", accelerator, every=2, groups=4), []
    for sync in (False, False, True, False, True, True, True):
        accelerator.sync_gradients = sync
        passes.append(one.step())
    assert passes == [1, 1, 1, 2, 2, 1, 2]


def test_a_step_that_fails_does_not_count():
    one = Counted("strategy", "apart", every=2, groups=3)
    assert one.step() == 1
    with pytest.raises(ApartError, match="groups=3 does not divide"):
        one.step()
    one.taken.set(groups=4)
    assert one.step() == 2


def changes_of(method):
    return {
        key: value
        for key, value in {
            "epsilon": 0.03,
            "groups": 2,
            "ratio": 0.5,
            "rho": 0.02,
            "eta": 0.3,
            "local_attack": True,
            "global_norm": True,
        }.items()
        if key in METHODS[method].hyper_parameters()
    }


@pytest.mark.parametrize("way", ["strategy", "loss"])
@pytest.mark.parametrize("method", HYPER)
def test_set_is_what_the_constructor_would_have_made(method, way):
    """Each alone, then all together; also after steps, whose tensors are kept."""
    changes = changes_of(method)
    for some in ([{key: value} for key, value in changes.items()] + [changes])[-3:]:
        one = Counted(way, method, generator=torch.Generator().manual_seed(3), **HYPER[method])
        one.step()
        one.taken.set(**some)
        state = copy.deepcopy(one.model.state_dict())
        other = Counted(way, method, generator=torch.Generator(), **HYPER[method] | some)
        other.model.load_state_dict(state)
        other.taken.load_state_dict(one.taken.state_dict())
        one.step(1)
        other.step(1)
        assert_same(gradients(one.model), gradients(other.model), tolerance=0)
    assert any(key in repr(getattr(one.taken, "strategy", one.taken)) for key in changes)


BAD = [
    ({"epsilon": -0.1}, "epsilon=-0.1: the radius must be"),
    ({"epsilon": math.nan}, "epsilon=nan"),
    ({"epsilon": "0.1"}, "epsilon='0.1'"),
    ({"rho": math.inf}, "rho=inf"),
    ({"groups": 0}, "groups=0"),
    ({"ratio": 1.5}, "ratio=1.5"),
    ({"every": 0}, "every=0: .* an integer >= 1"),
    ({"every": 1.5}, "every=1.5"),
    ({"every": True}, "every=True"),
    ({"epsilon": True}, "epsilon=True"),
    ({"epsilon": np.True_}, "epsilon=True"),
    ({"epsilon": torch.tensor([0.1, 0.2])}, "epsilon=tensor"),
    ({"epsilon": np.float64("nan")}, "epsilon=nan"),
    ({"epsilon": 0.1j}, "epsilon=0.1j"),
    ({"groups": np.float64(2.5)}, "groups=2.5"),
    ({"groups": torch.tensor(True)}, "groups=True"),
    ({"ratio": True}, "ratio=True: N/M"),
    ({"ratio": "0.5"}, "ratio='0.5': N/M"),
    ({"local_attack": "no"}, "local_attack='no': the option is True or False"),
    ({"local_attack": 1}, "local_attack=1: the option"),
    ({"global_norm": "x"}, "global_norm='x': the option"),
    ({"uneven": "no"}, "uneven='no'"),
    ({"eta": 0.1}, "'apart-sam' has no hyper-parameter 'eta' to set; it has epsilon, groups"),
    ({"Epsilon": 0.1}, "no hyper-parameter 'Epsilon'"),
]


@pytest.mark.parametrize("bad, message", BAD, ids=lambda value: str(value)[:20])
def test_a_bad_value_changes_nothing(bad, message):
    strategy = create_strategy("apart-sam", build("small"), every=3)
    before = repr(strategy), strategy.state_dict(), [vars(p).copy() for p in strategy.perturbations]
    with pytest.raises(ApartError, match=message) as error:
        strategy.set(**{"epsilon": 0.5, "rho": 0.5, "every": 7} | bad)
    assert "\n" not in str(error.value)
    after = repr(strategy), strategy.state_dict(), [vars(p) for p in strategy.perturbations]
    assert before[:2] == after[:2]
    assert [(p["epsilon"] if "epsilon" in p else p["rho"]) for p in after[2]] == [0.1, 0.2]
    if not {"eta", "Epsilon"} & bad.keys():
        with pytest.raises(ApartError, match=message):
            create_strategy("apart-sam", build("small"), **bad)
        with pytest.raises(ApartError, match=message):
            create_loss("apart-sam", build("small"), loss_fn, **bad)


def test_hyper_parameters_are_changed_by_set_alone():
    """An assignment had no effect, and no error."""
    strategy = create_strategy("apart", build("small"))
    for change in (
        lambda hyper: hyper.update(epsilon=0.2),
        lambda hyper: hyper.__setitem__("epsilon", 0.2),
        lambda hyper: hyper.pop("epsilon"),
        lambda hyper: hyper.clear(),
        lambda hyper: hyper.__ior__({"epsilon": 0.2}),
    ):
        with pytest.raises(ApartError, match=r"strategy\.set\(epsilon="):
            change(strategy.hyper)
    want = {"epsilon": 0.1, "groups": 16, "ratio": 1.0, "local_attack": False}
    assert strategy.hyper == want == json.loads(json.dumps(strategy.hyper)) == copy.deepcopy(strategy.hyper)
    assert pickle.loads(pickle.dumps(strategy.hyper)) == want
    kept = strategy.hyper
    strategy.set(epsilon=0.2)
    assert kept["epsilon"] == 0.1 and strategy.hyper["epsilon"] == 0.2  # what was recorded stays


def test_a_perturbation_of_one_s_own_is_set_by_its_attributes():
    class Noise(Perturbation):
        defaults = {"radius": 0.1, "hidden": 1.0}  # noqa: RUF012

        def __init__(self, model, *, radius, hidden):
            super().__init__(model)
            if radius < 0:
                raise ApartError("radius: not below 0.")
            self.radius = radius

    METHODS["noise"] = Method("noise", (Noise,))
    try:
        strategy = create_strategy("noise", build("small"))
        strategy.set(radius=0.3)
        assert strategy.perturbations[0].radius == strategy.hyper["radius"] == 0.3
        with pytest.raises(ApartError, match="radius: not below 0"):
            strategy.set(radius=-1)
        with pytest.raises(ApartError, match="Noise has no attribute 'hidden', so that it cannot be set"):
            strategy.set(radius=0.4, hidden=2.0)
        assert strategy.perturbations[0].radius == 0.3
    finally:
        del METHODS["noise"]


@pytest.mark.parametrize("way", ["strategy", "loss"])
@pytest.mark.parametrize("method", ["apart", "sam", "random-bn"])
def test_all_of_it_is_in_the_state(method, way):
    """In the midst of `every`, with a schedule: the rest of the steps is the same, from a strategy made otherwise."""
    hyper = HYPER[method] | ({} if method == "sam" else {"ratio": 0.5, "groups": 2})
    radius = "rho" if method == "sam" else "epsilon"

    def go_on(one, steps):
        found = []
        for step in steps:
            one.taken.set(**{radius: 0.02 * (1 + step // 2)})
            passes = one.step(step)
            found.append((passes, {n: g.clone() for n, g in gradients(one.model).items()}))
        return found

    one = Counted(way, method, generator=torch.Generator().manual_seed(3), every=3, **hyper)
    go_on(one, range(4))
    state, weights = copy.deepcopy(one.taken.state_dict()), copy.deepcopy(one.model.state_dict())
    want = go_on(one, range(4, 9))
    other = Counted(way, method, generator=torch.Generator(), **HYPER[method])
    other.model.load_state_dict(weights)
    other.taken.load_state_dict(state)
    found = go_on(other, range(4, 9))
    assert [passes for passes, _ in found] == [passes for passes, _ in want] == [1, 2, 1, 1, 2]
    for (_, a), (_, b) in zip(found, want):
        assert_same(a, b, tolerance=0)


def test_states_of_earlier_versions_load():
    """They hold the generator alone, or nothing; what they lack stays as it is."""
    generator = torch.Generator().manual_seed(5)
    for earlier in ({}, {"generator": generator.get_state()}):
        more = {"generator": torch.Generator()} if earlier else {}
        strategy = create_strategy("apart", build("small"), epsilon=0.3, every=2, **more)
        strategy.load_state_dict(earlier)
        assert (strategy.hyper["epsilon"], strategy.every, strategy.steps) == (0.3, 2, 0)
        if earlier:
            assert torch.equal(strategy.generator.get_state(), generator.get_state())


def test_a_state_of_another_method_is_refused():
    sam, apart = (create_strategy(method, build("small")) for method in ("sam", "apart"))
    apart.steps = 3
    with pytest.raises(ApartError, match=r"hyper-parameters epsilon, groups, .*'sam' has rho"):
        sam.load_state_dict(apart.state_dict())
    with pytest.raises(ApartError, match=r"of a plain step, and the method 'sam' has rho"):
        sam.load_state_dict(create_strategy("standard", build("small")).state_dict())
    assert sam.steps == 0


def test_the_state_is_read_without_code(tmp_path):
    strategy = create_strategy("apart-sam", build("small"), generator=torch.Generator().manual_seed(1), every=4)
    torch.save(strategy.state_dict(), tmp_path / "state.pt")
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    assert found.pop("generator").dtype == torch.uint8
    hyper = dict(strategy.hyper)
    assert found == {
        "name": "apart-sam",
        "steps": 0,
        "every": 4,
        "uneven": "error",
        "hyper": hyper,
        "made_with": hyper | {"every": 4, "uneven": "error"},
    }


NUMBERS = [
    (np.float64(0.25), 0.25),
    (np.float32(0.25), 0.25),
    (np.linspace(0, 1, 5)[1], 0.25),
    (np.array(0.25), 0.25),
    (torch.tensor(0.25), 0.25),
    (torch.linspace(0, 1, 5)[1], 0.25),
    (Fraction(1, 4), 0.25),
    (np.int64(1), 1),
    (torch.tensor(1), 1),
]


@pytest.mark.parametrize("way", ["strategy", "loss"])
@pytest.mark.parametrize("value, plain", NUMBERS, ids=lambda value: type(value).__name__)
def test_numbers_of_numpy_and_torch(value, plain, way, tmp_path):
    """They are what schedules compute; a state that has them was not read without code."""
    draws = [{"generator": torch.Generator().manual_seed(1)} for _ in range(2)]
    given = {"epsilon": value, "rho": value, "ratio": value, "groups": np.int64(2), "every": np.int32(1)}
    one = Counted(way, "apart-sam", **given, **draws[0])
    other = Counted(way, "apart-sam", epsilon=plain, rho=plain, ratio=plain, groups=2, **draws[1])
    one.step(), other.step()
    assert_same(gradients(one.model), gradients(other.model), tolerance=0)
    for counted in (one, other):
        counted.taken.set(epsilon=value / 2, groups=torch.tensor(1), every=np.int64(2))
        torch.save(counted.taken.state_dict(), tmp_path / "state.pt")
        found = torch.load(tmp_path / "state.pt", weights_only=True)
        values = [*found["hyper"].values(), *found["made_with"].values(), found["every"]]
        assert {type(number) for number in values} <= {int, float, bool, str}
        assert found["hyper"]["epsilon"] == plain / 2 and (found["hyper"]["groups"], found["every"]) == (1, 2)
        assert json.loads(json.dumps(found["hyper"])) == found["hyper"]


def test_perturbations_alone_take_them_too():
    model = build("small")
    statistics = AdversarialStatistics(model, epsilon=np.float32(0.25), groups=np.int64(2), local_attack=np.True_)
    weights = AdaptiveWeights(model, rho=torch.tensor(0.25), eta=np.float64(0.5), global_norm=False)
    for value, kind in (
        (statistics.epsilon, float),
        (statistics.groups, int),
        (statistics.local_attack, bool),
        (weights.rho, float),
        (weights.eta, float),
    ):
        assert type(value) is kind


def test_samples_of_numpy():
    x, y = batch(8, 8)
    compute_loss = create_loss("apart", build("small"), loss_fn, groups=2, ratio=0.5)
    assert compute_loss((x, y), samples=np.int64(8)) == compute_loss((x, y), samples=8)
