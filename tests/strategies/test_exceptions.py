"""An exception in any pass: the model, its gradients' flags and the generator are left alone, and no memory is held."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from apart_hf import ApartError, create_loss, create_strategy
from apart_hf.strategies.batches import map_tensors
from tests.support.helpers import batch, build, snapshot
from tests.support.oracle import FAMILY

# forwards of a step: the clean pass, those that climb, the perturbed one
PASSES = {"standard": 1} | dict.fromkeys(FAMILY, 2) | {"advprop": 4, "apart-advprop": 3, "advbn": 4}
CASES = [(method, k) for method, passes in PASSES.items() for k in range(1, passes + 1)]
TOGETHER = ["sam", "advprop"]


def held_bytes(strategy):
    """The memory of all tensors that a strategy and its parts hold beside the model's."""
    own = {p.untyped_storage().data_ptr() for p in (*strategy.model.parameters(), *strategy.model.buffers())}
    found = {}

    def look(tensor: Tensor) -> Tensor:
        for one in (tensor, tensor.grad if tensor.is_leaf else None):
            if one is not None and one.untyped_storage().data_ptr() not in own:
                found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        return tensor

    for part in (*strategy.perturbations, strategy.combination):
        map_tensors(look, {key: value for key, value in vars(part).items() if key not in ("model", "layers", "module")})
    return sum(found.values())


class Fails:
    """Raises in the k-th call, once: at the end of a forward, or within its backward."""

    def __init__(self, k, where):
        self.k, self.where, self.calls = k, where, 0

    def __call__(self, output, targets):
        self.calls += 1
        loss = cross_entropy(output, targets)
        if self.calls == self.k and self.where == "forward":
            raise RuntimeError("of the user")
        if self.calls == self.k:
            loss.register_hook(self.fail)
        return loss

    def fail(self, gradient):
        raise RuntimeError("of the user")


def options(method):
    return {**FAMILY["advprop"], "rho": 0.1} if method is TOGETHER else FAMILY.get(method, {})


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("method, k", [*CASES, *((TOGETHER, k) for k in range(1, 5))])
def test_nothing_is_left_by_an_exception(method, k, where):
    model, data = build("small"), batch(8, 12)
    generator = torch.Generator().manual_seed(3)
    strategy = create_strategy(method, model, generator=generator, **options(method))
    strategy.accumulate_gradients(*data, cross_entropy)
    weights, before = copy.deepcopy(dict(model.named_parameters())), snapshot(model)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    held, state, steps = held_bytes(strategy), generator.get_state(), strategy.steps
    # what torch's own step leaves where a loss cannot be computed
    plain = copy.deepcopy(model)
    plain(data[0])
    with pytest.raises(RuntimeError, match="of the user"):
        strategy.accumulate_gradients(*data, Fails(k, where))
    assert snapshot(model) == before and strategy.steps == steps
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers()))
    assert all(p.requires_grad for p in (*model.parameters(), *strategy.parameters()))
    assert held_bytes(strategy) <= held
    if k == 1:  # nothing was drawn yet
        assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("method", [TOGETHER, TOGETHER[::-1]], ids="+".join)
def test_nothing_is_held_where_a_perturbation_cannot_ascend(method):
    """The weights' step is there already, or still to come, as the loss turns out not to depend on the images."""
    model, data = build("small"), batch(8, 12)
    strategy = create_strategy(method, model, **options(TOGETHER))
    strategy.accumulate_gradients(*data, cross_entropy)
    held = held_bytes(strategy)
    with pytest.raises(ApartError, match="does not depend on the images"):
        strategy.accumulate(data, lambda part: cross_entropy(model(part[0].detach()), part[1]))
    assert held_bytes(strategy) <= held < sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("method", FAMILY)
def test_the_step_after_an_exception_is_as_if_there_was_none(method):
    """Also for the loss of another loop."""
    data, found = batch(8, 12), []
    for k in range(0, PASSES[method] + 1):
        for as_loss in (False, True):
            model, generator = build("small"), torch.Generator().manual_seed(3)
            made = {"generator": generator, **FAMILY[method]}
            fails = Fails(k, "forward")
            if as_loss:
                loss = create_loss(method, model, lambda m, part, fails=fails: fails(m(part[0]), part[1]), **made)
                strategy, step = loss.strategy, lambda loss=loss: loss(data).backward()
            else:
                strategy = create_strategy(method, model, **made)
                step = lambda s=strategy, fails=fails: s.accumulate_gradients(*data, fails)  # noqa: E731
            state = copy.deepcopy((model.state_dict(), strategy.state_dict()))
            if k:
                with pytest.raises(RuntimeError, match="of the user"):
                    step()
                model.load_state_dict(state[0])  # its running statistics
                strategy.load_state_dict(state[1])
                for p in (*model.parameters(), *strategy.parameters()):
                    p.grad = None
            step()
            found.append(torch.cat([p.grad.flatten() for p in (*model.parameters(), *strategy.parameters())]))
    # the two ways add up in another order
    assert all(torch.equal(one, found[i % 2]) for i, one in enumerate(found))
    assert torch.allclose(found[0], found[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ["advprop", "fast-advprop", "apart-advprop"])
def test_images_are_held_in_no_pass_of_a_step_that_ended(method):
    """Without an exception, too: a batch of images is as large as all the rest."""
    model, data = build("small"), batch(64, 32)
    strategy = create_strategy(method, model, **FAMILY[method])
    strategy.accumulate_gradients(*data, cross_entropy)
    assert held_bytes(strategy) < data[0].untyped_storage().nbytes() / 4
