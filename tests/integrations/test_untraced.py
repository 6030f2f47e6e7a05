"""All calls in a step but the first leave an object's attributes as they were."""

import array
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric
from transformers.modeling_outputs import ImageClassifierOutput

from apart_hf import create_strategy
from apart_hf.integrations import restored, untraced
from apart_hf.integrations.untraced import Traces
from tests.support.helpers import build


class Owner(nn.Module):
    """Has what people keep on modules, and changes all of it in a call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.number, self.text, self.nothing = 0, "", None
        self.items, self.unique, self.recent = [1], {1}, deque([1], maxlen=2)
        self.table, self.lists = OrderedDict(a=1), defaultdict(list, {"a": [1], "b": {"c": [1]}})
        self.total, self.replaced, self.untouched = torch.zeros(2), torch.zeros(2), torch.zeros(2)
        with torch.inference_mode():
            self.inferred = torch.zeros(2)

    def call(self):
        self.steps += 1  # a buffer is the two passes' affair
        self.number, self.text, self.nothing = self.number + 1, self.text + "x", 1
        self.items.append(2), self.unique.add(len(self.unique) + 1), self.recent.append(2)
        self.table["b"] = self.table.get("b", 0) + 1
        self.lists["a"].append(2), self.lists["b"]["c"].append(2), self.lists["new"].append(2)
        self.total += 1
        self.replaced = self.replaced + 1
        self.new = [self.number]

    def content(self):
        state = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        return repr([(key, type(value), value) for key, value in state.items()])


@pytest.mark.parametrize("long", [10_000, 0])
def test_the_first_call_counts_alone(long, monkeypatch):
    """Containers that count as long are looked into as well, where the first call has changed their length."""
    monkeypatch.setattr(untraced, "_LONG", long)
    owner, once = Owner(), Owner()
    once.call()
    held = owner.items, owner.lists["a"], owner.total, owner.recent
    traces = Traces([owner])
    for number in range(3):
        with traces.of_a_call() as is_first:
            owner.call()
            assert is_first == (number == 0) and owner.number == (1 if is_first else 2)
    assert owner.content() == once.content()
    assert (owner.items, owner.lists["a"], owner.total, owner.recent) == held
    assert owner.items is held[0] and owner.total is held[2] and owner.steps == 3


def test_an_exception_in_the_second_call():
    owner, once = Owner(), Owner()
    once.call()
    traces = Traces([owner])
    with traces.of_a_call():
        owner.call()
    with pytest.raises(RuntimeError), traces.of_a_call():
        owner.call()
        raise RuntimeError
    assert owner.content() == once.content()


def test_long_containers_that_the_first_call_leaves_alone_are_not_copied(monkeypatch):
    monkeypatch.setattr(untraced, "_LONG", 2)
    owner = Owner()
    owner.items = dataset = list(range(10))
    traces = Traces([owner])
    with traces.of_a_call():
        pass
    with traces.of_a_call():
        dataset[0] = -1
    assert owner.items[0] == -1


class Counts(Counter):
    """Has an attribute beside its items."""

    calls = 0


class Tagged(list):
    def clear(self):
        raise AssertionError("a method of the subclass")

    extend = append = clear


KINDS = {
    "Counter": (lambda: Counter("ab"), lambda v: v.update("bbc")),
    "Counter of one's own": (lambda: Counts("ab"), lambda v: (v.update("c"), setattr(v, "calls", v.calls + 1))),
    "ordered": (lambda: OrderedDict(a=1, b=2), lambda v: (v.move_to_end("a"), v.update(c=3))),
    "list of one's own": (lambda: Tagged([1]), lambda v: list.append(v, 2)),
    "user list": (lambda: UserList([1]), lambda v: v.append(2)),
    "user dict": (lambda: UserDict(a=[1]), lambda v: v["a"].append(2)),
    "chain": (lambda: ChainMap({"a": 1}, {"b": [1]}), lambda v: (v.update(a=2, c=v.get("c", 0) + 1), v["b"].append(2))),
    "array": (lambda: array.array("l", [1]), lambda v: v.append(2)),
    "bytes": (lambda: bytearray(b"x"), lambda v: v.extend(b"y")),
    "matrix": (lambda: np.zeros((2, 2), int), lambda v: v.__iadd__(1)),
    "object array": (lambda: np.array([0, None]), lambda v: v.__setitem__(0, v[0] + 1)),
    "list in a list": (lambda: [[0], [[0]]], lambda v: (v[0].append(1), v[1][0].append(1))),
    "list in a tuple": (lambda: ([], {"a": ([],)}), lambda v: (v[0].append(1), v[1]["a"][0].append(1))),
    "array in lists": (lambda: {"a": [np.zeros(2)]}, lambda v: v["a"][0].__iadd__(1)),
    "tensor in a dict": (lambda: {"x": torch.zeros(2)}, lambda v: v["x"].add_(1)),
    "tensor in a list": (lambda: [torch.zeros(2)], lambda v: v[0].add_(1)),
    "queue in a queue": (lambda: deque([deque([1], maxlen=1)]), lambda v: v[0].append(v[0][0] + 1)),
    "itself": (lambda: (lambda v: (v.append(v), v)[1])([1]), lambda v: v.append(2)),
    "metric in a dict": (lambda: {"a": MeanMetric()}, lambda v: v["a"].update(torch.tensor(3.0))),
    "metric in a list": (lambda: ([MeanMetric()],), lambda v: v[0][0].update(torch.tensor(3.0))),
}


def shown(value):
    """What can be seen of a value, with what it holds."""
    if isinstance(value, MeanMetric):
        return float(value.mean_value), float(value.weight), value._update_count
    if isinstance(value, dict):
        return type(value), [(key, shown(item)) for key, item in value.items()], vars(value) if vars_of(value) else None
    if isinstance(value, (list, tuple, deque)):
        return type(value), [shown(item) if item is not value else "itself" for item in value]
    return type(value), repr(value)


def vars_of(value):
    return getattr(value, "__dict__", None)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_of_any_kind(kind, inner):
    """Kept on the object, on a plain module within it, by a trainer that holds that; in place."""
    make, change = KINDS[kind]
    owner, once = nn.Module(), make()
    place = owner
    if inner:
        owner = type("Trainer", (), {})()
        owner.model = nn.Sequential(nn.Linear(1, 1), nn.Module())
        place = owner.model[1]
    place.kept = held = make()
    change(once)
    traces = Traces([owner])
    for _ in range(3):
        with traces.of_a_call():
            change(place.kept)
    assert place.kept is held and shown(held) == shown(once)


def test_what_a_model_returned_and_what_a_strategy_says_may_be_kept():
    """Their classes refuse to be updated."""
    owner, strategy = nn.Module(), create_strategy("apart", build("small"))
    traces, logits = Traces([owner]), []
    for _ in range(3):
        with traces.of_a_call():
            logits.append(torch.zeros(2, 3))
            owner.last, owner.hyper = ImageClassifierOutput(logits=logits[-1]), strategy.hyper
            owner.all = {"last": owner.last, "hyper": owner.hyper}
    assert owner.last.logits is owner.last["logits"] is logits[0] and list(owner.last) == ["logits"]
    assert owner.all["last"] is owner.last and owner.hyper is strategy.hyper and owner.hyper["epsilon"] == 0.1
    traces = Traces([owner])
    for number in range(2):
        with traces.of_a_call():
            owner.last.loss, owner.last["hidden_states"] = torch.tensor(float(number)), (torch.zeros(1),)
    assert owner.last.loss == owner.last["loss"] == 0


def test_attributes_of_modules_within_it_count_once():
    owner = nn.Module()
    owner.sub = nn.Module()
    owner.sub.count, owner.sub.history = 0, []
    traces = Traces([owner])
    for _ in range(2):
        with traces.of_a_call():
            owner.sub.count += 1
            owner.sub.history.append(1)
            owner.sub.new = owner.sub.count
    assert (owner.sub.count, owner.sub.history, owner.sub.new) == (1, [1], 1)


def test_large_arrays_are_left_alone(monkeypatch):
    """Nothing tells whether they were changed, and a copy in each step would cost more than it is worth."""
    monkeypatch.setattr(restored, "LARGE", 8)
    owner = nn.Module()
    owner.small, owner.large, owner.fixed = np.zeros(1), np.zeros(2), np.zeros(1)
    owner.fixed.flags.writeable = False
    traces = Traces([owner])
    for _ in range(2):
        with traces.of_a_call():
            owner.small += 1
            owner.large += 1
    assert owner.small.tolist() == [1] and owner.large.tolist() == [2, 2] and owner.fixed.tolist() == [0]
