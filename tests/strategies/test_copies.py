"""Copies of a strategy, and of a model that one has stepped: they go on as the originals do."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn.functional import cross_entropy

from apart_hf import create_strategy
from tests.support.helpers import assert_same, batch, build, gradients
from tests.support.oracle import FAMILY


def saved_and_loaded(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "save": saved_and_loaded}


def stepped(strategy, seed):
    """The gradients of one step, of the model's parameters and of the strategy's."""
    for p in (*strategy.model.parameters(), *strategy.parameters()):
        p.grad = None
    torch.manual_seed(seed)
    strategy.accumulate_gradients(*batch(8, 12, seed=seed), cross_entropy)
    return gradients(strategy.model) | {str(i): p.grad for i, p in enumerate(strategy.parameters())}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("with_generator", [False, True])
@pytest.mark.parametrize("method", ["standard", *FAMILY])
def test_a_copy_of_a_strategy_goes_on_as_it_does(method, with_generator, way):
    """Its deltas reach the layers of its own model, as pickle would not have it where tensors share their memory."""
    generator = torch.Generator().manual_seed(3) if with_generator else None
    strategy = create_strategy(method, build("small"), generator=generator, **FAMILY.get(method, {}))
    stepped(strategy, 1)
    other = WAYS[way](strategy)
    assert other.model is not strategy.model and repr(other) == repr(strategy) and other.steps == strategy.steps
    for seed in (2, 3):
        assert_same(stepped(other, seed), stepped(strategy, seed), tolerance=0)
    for one, two in zip(other.model.buffers(), strategy.model.buffers()):
        assert torch.equal(one, two)
    if with_generator:
        assert torch.equal(other.generator.get_state(), strategy.generator.get_state())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", FAMILY)
def test_a_copy_of_the_model_is_a_plain_model(method, way):
    """Nothing of the strategy comes with it, and what happens to the one does not reach the other."""
    strategy = create_strategy(method, build("small"), **FAMILY[method])
    stepped(strategy, 1)
    network = WAYS[way](strategy.model)
    images, targets = batch(8, 12, seed=2)
    kept = copy.deepcopy(network.state_dict())
    stepped(strategy, 2)
    assert all(torch.equal(value, kept[name]) for name, value in network.state_dict().items())
    plain = build("small")
    plain.load_state_dict(kept)
    for one in (network, plain):
        one.zero_grad()
        cross_entropy(one(images), targets).backward()
    assert_same(gradients(network), gradients(plain), tolerance=0)
