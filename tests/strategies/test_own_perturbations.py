"""A list in the place of a method's name: objects of one's own and perturbations of methods, all at once."""

from typing import ClassVar

import pytest
import torch
from torch.nn.functional import cross_entropy

from apart_hf import ApartError, Perturbation, create_loss, create_strategy
from apart_hf.strategies.bn_perturbations import GroupStatistics
from apart_hf.strategies.weight_perturbations import AdaptiveWeights, Weights
from tests.support.helpers import assert_same, batch, build, gradients


class Watch(Perturbation):
    """Moves nothing, and notes the passes that it is asked to move something in."""

    defaults: ClassVar = {"radius": 0.25}

    def __init__(self, model, *, radius=0.25):
        super().__init__(model)
        if not 0 <= radius < 1:
            raise ApartError(f"radius={radius}: is in [0, 1).")
        self.radius, self.opened = radius, []

    def applied(self, samples):
        self.opened.append((samples, self.radius))
        return super().applied(samples)


def step(method, way, data, **options):
    """The gradients of a step; `method` makes the perturbations of a model, or is a name."""
    model = build("test_byobnet")
    wanted = method if isinstance(method, str) else method(model)
    if way == "accumulate":
        create_strategy(wanted, model, **options).accumulate_gradients(*data, cross_entropy)
    else:
        create_loss(wanted, model, lambda model, part: cross_entropy(model(part[0]), part[1]), **options)(
            data
        ).backward()
    return gradients(model)


LISTS = [  # a list, options beside it, and the method and options that it must equal
    (lambda m: [Weights(m, rho=0.1, global_norm=False)], {"keeps_clean_gradient": False}, "sam", {"rho": 0.1}),
    (
        lambda m: ["apart", Weights(m, rho=0.2, global_norm=False)],
        {"groups": 4, "ratio": 0.5},
        "apart-sam",
        {"groups": 4, "ratio": 0.5},
    ),
    (lambda m: ("apart", "asam"), {"groups": 4, "eta": 0.02}, "apart-asam", {"groups": 4, "eta": 0.02}),
    (lambda m: [GroupStatistics(m, groups=2)], {}, "ghost-bn", {"groups": 2}),
    (lambda m: [Watch(m), "awp"], {"keeps_clean_gradient": False, "gamma": 0.1}, "awp", {"gamma": 0.1}),
]


@pytest.mark.parametrize("way", ["accumulate", "create_loss"])
@pytest.mark.parametrize("wanted, options, method, own", LISTS)
def test_a_list_is_the_method_that_names_the_same(wanted, options, method, own, way):
    data = batch()
    torch.manual_seed(0)
    found = step(wanted, way, data, **options)
    torch.manual_seed(0)
    assert_same(found, step(method, way, data, **own), tolerance=0)


def test_objects_are_used_and_set_and_kept(model, data):
    shift = Watch(model, radius=0.5)
    strategy = create_strategy([shift, "ghost-bn"], model, groups=2, ratio=0.5, every=2)
    assert strategy.perturbations[0] is shift and strategy.passes == 1.25
    assert repr(strategy) == "Watch+ghost-bn(radius=0.5, groups=2, ratio=0.5, every=2)"
    for radius in (0.5, 0.75):
        strategy.set(radius=radius)
        for _ in range(2):
            strategy.accumulate_gradients(*data, cross_entropy)
    assert strategy.perturbations[0] is shift and shift.opened == [(4, 0.5), (4, 0.75)]
    with pytest.raises(ApartError, match=r"^radius=2: is in \[0, 1\).$"):
        strategy.set(radius=2, groups=4)
    assert strategy.hyper == {"radius": 0.75, "groups": 2, "ratio": 0.5} and shift.radius == 0.75

    other = Watch(model)
    resumed = create_strategy([other, "ghost-bn"], model, groups=2)
    resumed.load_state_dict(strategy.state_dict())
    assert resumed.steps == 4 and other.radius == 0.75 and resumed.second_pass_size(8) == 4
    with pytest.raises(ApartError, match="of the same method"):
        create_strategy([Watch(model)], model).load_state_dict(strategy.state_dict())


def test_what_was_set_is_set_back(model):
    own = Watch(model, radius=0.5)
    strategy = create_strategy([own], model)
    for radius in (0.75, 0.5, 0.25, 0.75):
        strategy.set(radius=radius)
        assert own.radius == strategy.hyper["radius"] == radius


def test_methods_of_a_list_share_auxiliary_bn(model, data):
    strategy = create_strategy(["advprop", "advbn"], model, steps=2, aux_affine=True)
    names = [type(one).__name__ for one in strategy.perturbations]
    assert names == ["Inputs", "AuxiliaryBatchNorm", "FeatureStatistics"]
    strategy.accumulate_gradients(*data, cross_entropy)
    assert all(p.grad is not None for p in strategy.parameters())


class Forgetful(Watch):
    def __init__(self, model):
        self.model = model


class Orphan(Perturbation):
    def __init__(self):
        pass


WRONG = [
    (lambda m: [], {}, "the list has no perturbation; name some, or use the method 'standard'"),
    (lambda m: ["standard"], {}, "the list has no perturbation"),
    (lambda m: Watch(m), {}, r"Watch is a perturbation, and no name of a method; .* of objects: \[Watch\(model\)\]"),
    (lambda m: Watch, {}, r"Watch is a perturbation, and no name of a method; .* of objects: \[Watch\(model\)\]"),
    (lambda m: [Watch], {}, r"Watch is a class; pass an object: Watch\(model\)"),
    (lambda m: [m], {}, "the list holds an object of type ByobNet; it takes names of methods and objects"),
    (lambda m: [None], {}, "the list holds an object of type NoneType"),
    (lambda m: ["aprat"], {}, "unknown method 'aprat': did you mean 'apart'"),
    (lambda m: [Watch(build("bn1d"))], {}, "Watch was made for another model than the strategy's"),
    (lambda m: [Orphan()], {}, r"Orphan was made for another model .* super\(\).__init__\(model\)"),
    (lambda m: [Forgetful(m)], {}, "Forgetful has no attribute 'radius', which its defaults name"),
    (lambda m: [Watch(m)] * 2, {"radius": 0.1}, "radius= is given beside a Watch, which has radius=0.25"),
    (lambda m: [Watch(m)] * 2, {}, "Watch is in the list twice"),
    (lambda m: ["apart", "apart-sam"], {}, "AdversarialStatistics is in the list twice"),
    (lambda m: [Watch(m), Watch(m, radius=0.5)], {}, "two of the perturbations have radius, 0.25 and 0.5"),
    (lambda m: ["sam", "asam"], {}, "two of the perturbations have rho, 0.05 and 0.5"),
    (lambda m: ["apart", "gsam"], {}, "method 'gsam' decides how gradients are combined; use it alone"),
    (lambda m: ["fast-advprop"], {}, "method 'fast-advprop' decides how gradients are combined"),
    (lambda m: [Watch(m)], {"epsilon": 0.1}, "method 'Watch' has no hyper-parameter 'epsilon'; it has radius, ratio"),
    (lambda m: [Watch(m)], {"keeps_clean_gradient": False, "ratio": 0.5}, "has no hyper-parameter 'ratio'"),
    (lambda m: [Watch(m)], {"keeps_clean_gradient": 1}, "keeps_clean_gradient=1: the option is True or False"),
    (lambda m: "apart", {"keeps_clean_gradient": False}, "keeps_clean_gradient=False: the method 'apart' decides that"),
    (lambda m: {"apart"}, {}, "the name of a method comes first, .* an object of type set"),
]


@pytest.mark.parametrize("way", ["accumulate", "create_loss"])
@pytest.mark.parametrize("wanted, options, said", WRONG)
def test_what_a_list_cannot_be(wanted, options, said, way, data):
    with pytest.raises(ApartError, match=said) as caught:
        step(wanted, way, data, **options)
    assert "\n" not in str(caught.value)


def test_two_objects_of_one_class_that_agree(model, data):
    strategy = create_strategy([Watch(model), Watch(model)], model)
    strategy.set(radius=0.5)
    assert [one.radius for one in strategy.perturbations] == [0.5, 0.5]


def test_a_loss_owns_the_backward_of_objects_too(model, data):
    with pytest.raises(ApartError, match="accelerator= is not taken here"):
        create_loss([AdaptiveWeights(model, rho=0.1, eta=0.0, global_norm=False)], model, print, accelerator=None)
