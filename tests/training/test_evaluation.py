"""Evaluation works in inference mode and in the layout of the weights, gives the same, and leaves nothing behind."""

import copy

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf import create_strategy
from apart_hf.training.evaluation import evaluate
from tests.support.helpers import assert_same, batch, build, gradients


def loader(rows=12, pixels=32, size=4):
    images, labels = batch(rows, pixels, dtype=torch.float32)
    return list(zip(images.split(size), labels.split(size)))


def step(model, run=None, seed=1, method="apart"):
    strategy = create_strategy(method, model if run is None else run)
    if method == "apart":
        strategy.set(groups=2)
    strategy.accumulate_gradients(*batch(8, dtype=torch.float32, seed=seed), cross_entropy)


class Seen(nn.Module):
    """Notes in which mode and layout it is called."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.notes = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), []

    def forward(self, x):
        self.notes.append((torch.is_inference_mode_enabled(), x.is_contiguous(memory_format=torch.channels_last)))
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_works_in_inference_mode_and_in_the_layout_of_the_weights(layout):
    network = Seen().to(memory_format=layout)
    batches = loader()
    found = evaluate(network, batches, Accelerator(cpu=True), mistakes=3)
    assert network.notes == [(True, layout is torch.channels_last)] * 3
    with torch.no_grad():
        output, labels = torch.cat([network(x) for x, _ in batches]), torch.cat([y for _, y in batches])
    assert found.eval_loss == pytest.approx(cross_entropy(output, labels).item(), rel=1e-6)
    assert found.predictions.predicted.tolist() == output.argmax(1).tolist()
    assert not any(mistake.image.is_inference() for mistake in found.predictions.mistakes)
    assert all(x.is_contiguous() and not x.is_inference() for x, _ in batches)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_bit_for_bit_what_it_was_without(layout):
    """The same batches, by plain calls."""
    network = build("test_byobnet", dtype=torch.float32).to(memory_format=layout)
    found = evaluate(network, loader(), Accelerator(cpu=True))
    with torch.no_grad():
        losses = [cross_entropy(network.eval()(x), y, reduction="none") for x, y in loader()]
    assert found.eval_loss == torch.cat(losses).mean().item()


def leaves(network):
    """Every tensor that the network holds, in its state or beside it."""
    yield from network.state_dict(keep_vars=True).values()
    for module in network.modules():
        for value in vars(module).values():
            held = value.values() if isinstance(value, dict) else [value]
            yield from (one for one in held if isinstance(one, torch.Tensor))


@pytest.mark.parametrize("name, pixels", [("test_byobnet", 32), ("test_efficientnet", 32), ("levit_128s", 224)])
def test_a_network_keeps_nothing_of_it(name, pixels):
    """Also what LeViT keeps of its attention biases in eval mode, which a gradient may go through later."""
    network = build(name, dtype=torch.float32)
    evaluate(network, loader(2, pixels, 2), Accelerator(cpu=True))
    assert not network.training and not any(tensor.is_inference() for tensor in leaves(network))
    network(batch(2, pixels, dtype=torch.float32)[0]).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("averaged", [False, True])
def test_training_goes_on_as_if_nothing_had_been_evaluated(averaged):
    found = []
    for evaluated in (False, True):
        network = build("test_byobnet", dtype=torch.float32)
        ema = ModelEmaV3(network, decay=0.5)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        for seed in range(3):
            network.train().zero_grad()
            step(network, seed=seed)
            optimizer.step()
            ema.update(network, step=seed + 1)
            if evaluated:
                evaluate(ema.module if averaged else network, loader(), Accelerator(cpu=True))
        state = dict(network.state_dict()) | {f"ema.{key}": value for key, value in ema.module.state_dict().items()}
        assert any(key.endswith("num_batches_tracked") and value == 3 for key, value in state.items())
        assert not any(value.is_inference() for value in state.values())
        found.append({key: value.float() for key, value in state.items()})
    assert_same(*found, tolerance=0)


def test_within_an_autocast_block_weights_stay_trainable():
    """The block keeps weights in 16 bits for its length: those of the evaluation would be no part of a graph."""
    network = build("test_byobnet", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        evaluate(network, loader(), Accelerator(cpu=True))
        loss = cross_entropy(network.train()(batch(8, dtype=torch.float32)[0]), batch(8)[1])
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.skipif(torch.__version__ < (2, 14), reason="torch 2.6 compiles the passes anew at every call")
def test_a_compiled_network_trains_on_as_it_was():
    network = build("small", dtype=torch.float32)
    eager = copy.deepcopy(network)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager")
    results = []
    for run in (compiled, eager):
        accelerator, model = Accelerator(cpu=True), network if run is compiled else eager
        step(model, run, method="standard")
        results.append(evaluate(run, loader(), accelerator))
        model.train().zero_grad()
        step(model, run, seed=2, method="standard")
        assert not any(tensor.is_inference() for tensor in leaves(model))
    torch._dynamo.reset()
    assert results[0].eval_loss == pytest.approx(results[1].eval_loss, rel=1e-5)
    assert_same(gradients(network), gradients(eager), tolerance=1e-4)


def test_timm_has_such_a_network():
    """That the test of LeViT can fail: within inference mode it keeps a tensor that no gradient goes through."""
    network = timm.create_model("levit_128s").eval()
    with torch.inference_mode():
        network(torch.zeros(1, 3, 224, 224))
    assert any(tensor.is_inference() for tensor in leaves(network))
