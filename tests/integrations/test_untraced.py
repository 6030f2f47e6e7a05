"""All calls in a step but the first leave an object's attributes as they were."""

from collections import OrderedDict, defaultdict, deque

import pytest
import torch
from torch import nn

from apart_hf.integrations import untraced
from apart_hf.integrations.untraced import Traces


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
