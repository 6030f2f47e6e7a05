"""Batches of any kind give the gradient of the same samples as two tensors, and outputs come back as what they were."""

import collections
import dataclasses
import types
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf import ApartError, create_loss, create_strategy
from apart_hf.strategies.batches import map_tensors
from tests.support.helpers import assert_same, batch, build, gradients

HALF = {"epsilon": 0.2, "groups": 2, "ratio": 0.5}


@dataclasses.dataclass
class Plain:
    x: Any
    y: Any
    note: str = "kept"


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: Any
    y: Any
    twice: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self):
        object.__setattr__(self, "twice", self.y.repeat(1))


class Pair(NamedTuple):
    x: Any
    y: Any


class Encoding(collections.UserDict):
    """What tokenisers give: a mapping that is no dict, with attributes, and a constructor that asks for more."""

    def __init__(self, data, source, must_be_named=None):
        assert must_be_named is not None
        super().__init__(data)
        self.source = source


class Ordered(collections.OrderedDict):
    """What models of transformers return: keys are attributes, too."""

    def __getattr__(self, key):
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None


KINDS = {
    "dict": lambda x, y: {"x": x, "y": y},
    "ordered": lambda x, y: Ordered(x=x, y=y),
    "defaultdict": lambda x, y: collections.defaultdict(list, x=x, y=y),
    "read-only mapping": lambda x, y: types.MappingProxyType({"x": x, "y": y}),
    "user dict": lambda x, y: Encoding({"x": x, "y": y}, "file", must_be_named=1),
    "list": lambda x, y: [x, y],
    "deque": lambda x, y: collections.deque([x, y], maxlen=2),
    "tuple": lambda x, y: (x, y),
    "named tuple": Pair,
    "dataclass": Plain,
    "frozen dataclass": Frozen,
    "nested": lambda x, y: {"inputs": (Plain(x, y), 3, None), "scale": torch.tensor(1.0), "name": "batch"},
}


def take(part):
    """Images and targets of a batch of any kind, and that it is of its kind."""
    if isinstance(part, dict) and "inputs" in part:
        assert part["scale"].shape == () and part["name"] == "batch" and part["inputs"][1:] == (3, None)
        part = part["inputs"][0]
    if isinstance(part, Frozen):
        assert torch.equal(part.twice, part.y)
    if isinstance(part, (collections.abc.Mapping)):
        return part["x"], part["y"]
    if hasattr(part, "x"):
        return part.x, part.y
    return part[0], part[1]


def plain_gradients(method, hyper, samples=8):
    model = build("small")
    x, y = batch(samples, 8)
    strategy = create_strategy(method, model, generator=torch.Generator().manual_seed(3), **hyper)
    loss, _ = strategy.accumulate_gradients(x, y, cross_entropy)
    return gradients(model), loss


WHOLE = {"epsilon": 0.2, "groups": 2}


@pytest.mark.parametrize("kind, hyper", [*((kind, HALF) for kind in KINDS), ("dict", WHOLE), ("tuple", WHOLE)])
def test_a_batch_of_any_kind(kind, hyper):
    want, loss = plain_gradients("apart", hyper)
    made, seen = KINDS[kind](*batch(8, 8)), []
    for call in ("accumulate", "create_loss"):
        model, generator = build("small"), torch.Generator().manual_seed(3)

        def loss_fn(part, model=model):
            seen.append(type(part))
            x, y = take(part)
            return cross_entropy(model(x), y)

        if call == "accumulate":
            found, aux = create_strategy("apart", model, generator=generator, **hyper).accumulate(made, loss_fn)
            assert aux is None
        else:
            found = create_loss("apart", model, lambda _, part: loss_fn(part), generator=generator, **hyper)(made)
            found.backward()
        assert_same(gradients(model), want, tolerance=0)
        assert torch.equal(found, loss)
    assert set(seen) == {type(made)} and len(seen) == 4


@pytest.mark.parametrize("groups, keys", [(2, 2), (1, 3), (4, 4)])
def test_a_dict_of_images_is_not_as_many_samples_as_keys(groups, keys):
    """Two keys were two samples: a gradient 58 % off, without a word."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("small")

        def forward(self, inputs):
            return self.inner(inputs["image"])

    images, targets = batch(16, 8)
    named = {"image": images} | {f"unused {k}": torch.zeros(16, 2) for k in range(keys - 1)}
    for hyper in ({"groups": groups}, {"groups": groups, "ratio": 0.5}):
        want, _ = plain_gradients("apart", hyper, samples=16)
        model = Named()
        strategy = create_strategy("apart", model, generator=torch.Generator().manual_seed(3), **hyper)
        strategy.accumulate_gradients(named, targets, cross_entropy)
        assert_same({n.removeprefix("inner."): g for n, g in gradients(model).items()}, want, tolerance=0)


@pytest.mark.parametrize("kind", KINDS)
def test_aux_keeps_its_type_and_is_detached(kind):
    model, (x, y) = build("small"), batch(8, 8)

    def loss_fn(part):
        output = model(part[0])
        return cross_entropy(output, part[1]), KINDS[kind](output, y)

    for method in ("standard", "apart"):
        hyper = {"groups": 2} if method == "apart" else {}
        one = create_loss(method, model, lambda _, part: loss_fn(part), **hyper)((x, y))
        two = create_strategy(method, model, **hyper).accumulate((x, y), loss_fn)
        for _, aux in (one, two):
            assert type(aux) is type(KINDS[kind](x, y))
            output, same = take(aux)
            assert output.shape == (8, 5) and not output.requires_grad and same is y
            if kind == "user dict":
                assert aux.source == "file"
            if kind == "deque":
                assert aux.maxlen == 2
            if kind == "dataclass":
                assert aux.note == "kept"
        assert one[0].requires_grad and not two[0].requires_grad


def test_a_loss_in_a_named_tuple_comes_back_in_one():
    class Out(NamedTuple):
        loss: torch.Tensor
        logits: torch.Tensor

    def loss_fn(model, part):
        logits = model(part[0])
        return Out(cross_entropy(logits, part[1]), logits)

    model = build("small")
    for method in ("standard", "apart"):
        out = create_loss(method, model, loss_fn, **({"groups": 2} if method == "apart" else {}))(batch(8, 8))
        assert type(out) is Out and out.loss.requires_grad and not out.logits.requires_grad
        assert type(create_loss(method, model.eval(), loss_fn)(batch(8, 8))) is Out
        model.train()


def test_what_has_no_changed_tensor_is_not_copied():
    size, tree = torch.Size([3]), {"a": [1, (2, "x")], "b": Plain(1, 2), "c": bytearray(b"xy"), "d": range(3)}
    assert map_tensors(lambda t: t + 1, tree) is tree and map_tensors(lambda t: t + 1, size) is size
    tensor = torch.ones(2)
    tree["e"] = [tensor]
    assert map_tensors(lambda t: t, tree) is tree
    new = map_tensors(lambda t: t + 1, tree)
    assert new["e"][0].tolist() == [2, 2] and tree["e"][0] is tensor and new["a"] is tree["a"]
    found = map_tensors(lambda t: t + 1, torch.return_types.max((tensor, tensor)))
    assert type(found) is torch.return_types.max and found.values.tolist() == [2, 2]


@pytest.mark.parametrize("method", ["apart", "random-bn", "apart-sam"])
def test_targets_of_any_kind_with_a_part_of_the_batch(method):
    """Those of mixup: two labels and a weight, as numbers, tensors or a dict of them."""
    x, y = batch(8, 8)
    other = y.flip(0)
    soft = 0.7 * nn.functional.one_hot(y, 5).double() + 0.3 * nn.functional.one_hot(other, 5).double()
    found = []
    for targets in (soft, (y, other, 0.7), [y, other, torch.tensor(0.7)], {"a": y, "b": other, "weight": 0.7}):

        def criterion(output, targets):
            if isinstance(targets, torch.Tensor):
                return cross_entropy(output, targets)
            a, b, weight = targets.values() if isinstance(targets, dict) else targets
            return float(weight) * cross_entropy(output, a) + (1 - float(weight)) * cross_entropy(output, b)

        model = build("small")
        strategy = create_strategy(method, model, generator=torch.Generator().manual_seed(3), **HALF)
        strategy.accumulate_gradients(x, targets, criterion)
        found.append(gradients(model))
    for other in found[1:]:
        assert_same(other, found[0], tolerance=1e-6)  # 0.7 as a float32


def test_tensors_of_all_samples_stay_where_the_number_is_given():
    """Class weights, and rows of which each sample has several: neither is a sample's alone."""
    x, y = batch(8, 8)
    weights = torch.linspace(0.5, 1.5, 5).double()
    found = []
    for give_all in (False, True):
        model = build("small")
        strategy = create_strategy("apart", model, generator=torch.Generator().manual_seed(3), **HALF)

        def loss_fn(part, model=model):
            return cross_entropy(model(part["x"]), part["y"], part.get("weights", weights))

        whole = {"x": x, "y": y} | ({"weights": weights} if give_all else {})
        if give_all:
            with pytest.raises(ApartError, match=r"has tensors of 5 and 8 rows.*samples=N"):
                strategy.accumulate(whole, loss_fn)
        strategy.accumulate(whole, loss_fn, samples=8 if give_all else None)
        found.append(gradients(model))
    assert_same(*found, tolerance=0)


def test_several_rows_a_sample():
    """Four samples of two views each, said by samples=4: views of a sample stay in its group."""

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("small")

        def forward(self, views):
            return self.inner(views).view(-1, 2, 5).mean(1)

    x, y = batch(8, 8)
    model, paired = Views(), Views()
    strategy = create_strategy("apart", model, groups=2)
    strategy.accumulate({"x": x, "y": y[:4]}, lambda part: cross_entropy(model(part["x"]), part["y"]), samples=4)
    strategy = create_strategy("apart", paired, groups=2)
    loss_fn = lambda part: cross_entropy(paired(part["x"].flatten(0, 1)), part["y"])  # noqa: E731
    strategy.accumulate({"x": x.view(4, 2, *x.shape[1:]), "y": y[:4]}, loss_fn)
    assert_same(gradients(model), gradients(paired))


def test_a_list_of_images_as_detectors_take_it():
    """One item an image: as many samples as items, also where every image has as many channels as there are images."""

    class Stacks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("small")

        def forward(self, images):
            return self.inner(torch.stack(images))

    for count in (8, 3):
        x, y = batch(count, 8)
        model = Stacks()
        boxes = [{"label": label, "boxes": torch.zeros(k, 4)} for k, label in enumerate(y)]
        criterion = lambda output, targets: cross_entropy(output, torch.stack([t["label"] for t in targets]))  # noqa: E731
        create_strategy("apart", model, groups=1).accumulate_gradients(list(x), boxes, criterion)
        want = build("small")
        create_strategy("apart", want, groups=1).accumulate_gradients(x, y, cross_entropy)
        assert_same({n.removeprefix("inner."): g for n, g in gradients(model).items()}, gradients(want), tolerance=0)


SAY = {
    "no tensor": (["a", "b"], None, "has no tensor with a row for each sample"),
    "numbers": ({"x": 1, "y": torch.tensor(2.0)}, None, "has no tensor with a row for each sample"),
    "two lengths": ((torch.zeros(8, 3, 8, 8), torch.zeros(4)), None, "tensors of 4 and 8 rows"),
    "nothing to draw from": (
        (torch.zeros(8, 3, 8, 8), torch.zeros(8)),
        4,
        r"no tensor of the batch \(tuple\) has 4 rows",
    ),
    "empty": ((torch.zeros(0, 3, 8, 8), torch.zeros(0)), None, "the batch has no samples"),
    "empty, given": ((torch.zeros(0, 3, 8, 8), torch.zeros(0)), 0, "the batch has no samples"),
    "no number": ((torch.zeros(8, 3, 8, 8), torch.zeros(8)), 2.5, "samples=2.5: .* an integer >= 1"),
    "negative": ((torch.zeros(8, 3, 8, 8), torch.zeros(8)), -8, "samples=-8: .* an integer >= 1"),
}


@pytest.mark.parametrize("case", SAY)
def test_batches_whose_samples_cannot_be_told(case):
    made, samples, message = SAY[case]
    model = build("small", dtype=torch.float32)
    loss_fn = lambda part: model(torch.zeros(4, 3, 8, 8)).logsumexp(1).mean()  # noqa: E731
    strategy = create_strategy("apart", model, groups=2, ratio=0.5)
    compute_loss = create_loss("apart", model, lambda _, part: loss_fn(part), groups=2, ratio=0.5)
    for call in (
        lambda: strategy.accumulate(made, loss_fn, samples=samples),
        lambda: compute_loss(made, samples=samples),
    ):
        with pytest.raises(ApartError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["standard", "apart", "sam", "random-bn"])
def test_empty_images(method):
    model = build("small", dtype=torch.float32)
    with pytest.raises(ApartError, match="the batch has no samples"):
        create_strategy(method, model).accumulate_gradients(
            torch.zeros(0, 3, 8, 8), torch.zeros(0).long(), cross_entropy
        )
    with pytest.raises(ApartError, match="the batch has no samples"):
        create_strategy("apart", model).second_pass_size(0)


def test_targets_with_other_rows_than_the_images_have():
    x, y = batch(8, 8)
    strategy = create_strategy("apart", build("small"), groups=2, ratio=0.5)
    with pytest.raises(ApartError, match="has 16 rows for 8 samples, so that the samples of the second pass"):
        strategy.accumulate_gradients(x, y.repeat_interleave(2), lambda output, y: cross_entropy(output, y[::2]))


def test_sam_asks_for_no_number_of_samples():
    """It moves weights, whatever the batch is."""
    x, y = batch(8, 8)
    found = []
    for made in ({"x": x, "y": y}, {"x": x, "y": y, "boxes": torch.zeros(13, 4)}):
        model = build("small")
        create_strategy("sam", model, rho=0.1).accumulate(made, lambda b, m=model: cross_entropy(m(b["x"]), b["y"]))
        found.append(gradients(model))
    assert_same(*found, tolerance=0)
    seen = []
    strategy = create_strategy("sam", model)
    strategy.accumulate(["some.png", "other.png"], lambda names: (seen.append(names), cross_entropy(model(x), y))[1])
    assert seen == [["some.png", "other.png"]] * 2
