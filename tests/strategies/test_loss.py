"""The two passes as a loss: what its backward adds is the strategy's gradient, in loops that own the backward."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf import ApartError, create_loss, create_strategy
from tests.reference import reference_step
from tests.support.helpers import assert_same, batch, build, gradients
from tests.support.loops import CASES, HYPER, hyper_of, loss_and_output


def autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def trained(way, method, ratio, dtype, layout=torch.contiguous_format, steps=3):
    """Weights, buffers and losses of a few steps with momentum."""
    model = build("small", dtype=torch.float32).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options = {"generator": torch.Generator().manual_seed(3)} | hyper_of(method, ratio)
    if way == "create_loss":
        compute_loss = create_loss(method, model, loss_and_output, **options)
    else:
        strategy = create_strategy(method, model, autocast=lambda: autocast(dtype), **options)
    found = {}
    for step in range(steps):
        x, y = batch(8, 16, seed=step, dtype=torch.float32)
        part = {"x": x.contiguous(memory_format=layout), "y": y}
        if way == "create_loss":
            with autocast(dtype):
                loss, output = compute_loss(part)
            loss.backward()
        elif way == "accumulate":
            loss, output = strategy.accumulate(part, lambda part: loss_and_output(model, part))
        else:
            loss, output = strategy.accumulate_gradients(part["x"], part["y"], cross_entropy)
        assert not output.requires_grad
        found |= {f"loss {step}": loss.detach(), f"output {step}": output}
        optimizer.step()
        optimizer.zero_grad()
    return found | model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method, ratio", CASES)
def test_bit_equal_to_a_plain_loop(method, ratio, dtype):
    """In channels_last, too: norms, and so SAM's step, depend on the layout of gradients in the last bit."""
    layout = torch.channels_last if dtype == torch.float32 else torch.contiguous_format
    want = trained("accumulate_gradients", method, ratio, dtype, layout)
    for way in ("accumulate", "create_loss"):
        assert_same(trained(way, method, ratio, dtype, layout), want, tolerance=0)


def accumulated_reference(model, method, parts, ratio, generator):
    """The mean of the oracle's gradients, each batch from the buffers that the one before has left."""
    found = [
        reference_step(model, x, y, cross_entropy, method, ratio=ratio, generator=generator, **HYPER[method])[0]
        for x, y in parts
    ]
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


@pytest.mark.parametrize("together", [False, True], ids=["one backward each", "one backward of the sum"])
@pytest.mark.parametrize("method, ratio", CASES)
def test_accumulation_agrees_with_the_oracle(method, ratio, together):
    """Steps of three, two and one batch in float64, by loss / batches of the step, as trainers divide."""
    for batches in (3, 2, 1):
        parts = [batch(16, 8, seed=k) for k in range(batches)]
        model, generators = build("small"), [torch.Generator().manual_seed(7) for _ in range(2)]
        want = accumulated_reference(model, method, parts, ratio, generators[0])
        compute_loss = create_loss(method, model, loss_and_output, generator=generators[1], **hyper_of(method, ratio))
        losses = []
        for x, y in parts:
            losses.append(compute_loss({"x": x, "y": y})[0] / batches)
            if not together:
                losses.pop().backward()
        if together:
            sum(losses).backward()
        assert_same(gradients(model), want, tolerance=1e-14)


@pytest.mark.parametrize("method", ["standard", "apart", "sam", "apart-sam"])
def test_accumulated_over_what_accumulate_gradients_adds(method):
    """Two ways into one p.grad, within 1e-14 of the plain loop."""
    parts, found = [batch(16, 8, seed=k) for k in range(3)], []
    for ways in ("plain plain plain", "loss plain loss"):
        model = build("small")
        strategy = create_strategy(method, model, **HYPER[method])
        compute_loss = create_loss(method, model, loss_and_output, **HYPER[method])
        for way, (x, y) in zip(ways.split(), parts):
            if way == "plain":
                strategy.accumulate_gradients(x, y, cross_entropy, backward=lambda loss: (loss / 3).backward())
            else:
                (compute_loss({"x": x, "y": y})[0] / 3).backward()
        found.append(gradients(model))
    assert_same(*found, tolerance=1e-14)


def test_the_loss_is_one_term_among_others():
    """Its weight, and a penalty in plain torch, are those of any sum."""
    model, (x, y) = build("small"), batch(8, 8)
    want, _, _ = reference_step(model, x, y, cross_entropy, "apart", **HYPER["apart"])
    loss, _ = create_loss("apart", model, loss_and_output, **HYPER["apart"])({"x": x, "y": y})
    (0.3 * loss + sum(p.square().sum() for p in model.parameters()) / 2).backward()
    assert_same(gradients(model), {n: 0.3 * g + dict(model.named_parameters())[n].detach() for n, g in want.items()})


@pytest.mark.parametrize("method", ["apart", "sam", "apart-sam"])
def test_terms_whose_graphs_are_still_open(method):
    """A plain loss and a plain step's, computed before the two passes and differentiated after them."""
    model, (x, y), (other, labels) = build("small"), batch(8, 8), batch(8, 8, seed=2)
    compute_loss = create_loss(method, model, loss_and_output, every=2, **HYPER[method])
    plain = cross_entropy(model(other), labels)
    total = plain + compute_loss({"x": other, "y": labels})[0] + compute_loss({"x": x, "y": y})[0]
    total.backward()
    want, model_ = gradients(model), build("small")
    strategy = create_strategy(method, model_, **HYPER[method])
    strategy.accumulate_gradients(x, y, cross_entropy)
    (2 * cross_entropy(model_(other), labels)).backward()
    assert_same(gradients(model_), want, tolerance=1e-14)


@pytest.mark.parametrize("method", ["apart", "sam"])
def test_a_second_backward_is_an_error_unless_the_graph_is_kept(method):
    model, (x, y) = build("small"), batch(8, 8)
    compute_loss = create_loss(method, model, loss_and_output, **HYPER[method])
    loss, _ = compute_loss({"x": x, "y": y})
    loss.backward(retain_graph=True)
    once = {n: g.clone() for n, g in gradients(model).items()}
    loss.backward()
    assert_same(gradients(model), {n: 2 * g for n, g in once.items()}, tolerance=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert_same(gradients(model), {n: 2 * g for n, g in once.items()}, tolerance=0)


def test_a_loss_without_its_backward_leaves_no_gradient():
    model, (x, y) = build("small"), batch(8, 8)
    compute_loss = create_loss("sam", model, loss_and_output)
    compute_loss({"x": x, "y": y})
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["standard", "apart", "sam"])
def test_in_eval_mode_and_without_gradients_it_is_the_plain_loss(method):
    model, (x, y), calls = build("small"), batch(8, 8), []

    def counted(model, part):
        calls.append(part)
        return loss_and_output(model, part)

    compute_loss = create_loss(method, model, counted, **HYPER[method])
    uneven = {"x": x[:7], "y": y[:7]}  # fits no groups
    model.eval()
    loss, output = compute_loss(uneven)
    want = loss_and_output(model, uneven)
    assert torch.equal(loss, want[0]) and torch.equal(output, want[1])
    loss.backward()
    found = {n: g.clone() for n, g in gradients(model).items()}
    model.zero_grad()
    want[0].backward()
    assert_same(found, gradients(model), tolerance=0)
    model.train()
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            loss, output = compute_loss(uneven)
        assert not loss.requires_grad and torch.equal(loss, want[0]) is False
    assert len(calls) == 3 and compute_loss.strategy.steps == 0
    with torch.no_grad():
        assert torch.equal(compute_loss({"x": x, "y": y})[0], cross_entropy(model(x), y))


@pytest.mark.parametrize("method", ["apart", "sam", "apart-sam"])
def test_buffers_are_those_of_a_plain_step(method, model, data):
    plain = copy.deepcopy(model)
    cross_entropy(plain(data[0]), data[1]).backward()
    create_loss(method, model, loss_and_output, **HYPER[method])({"x": data[0], "y": data[1]})[0].backward()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers()))


def test_compiled_models():
    """What is compiled computes both passes, in as many graphs as by the strategy."""
    model, graphs = build("small", dtype=torch.float32), []

    def backend(graph, _):
        graphs.append(1)
        return graph.forward

    torch._dynamo.reset()
    try:
        eager, (x, y) = copy.deepcopy(model), batch(8, 8, dtype=torch.float32)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for network in (compiled, eager):
            compute_loss = create_loss("apart", network, loss_and_output, groups=2)
            for _ in range(2):
                compute_loss({"x": x, "y": y})[0].backward()
        assert len(graphs) == 2
        assert_same(gradients(model), gradients(eager), tolerance=1e-4)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """torch's newer form gives the same; the older one, which cannot be asked for gradients, says so."""
    found, (x, y) = [], batch(8, 8)
    for checkpoints in (False, True):

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = build("small")

            def forward(self, x, checkpoints=checkpoints):
                if not checkpoints:
                    return self.inner(x)
                return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)

        model = Net()
        compute_loss = create_loss("apart", model, loss_and_output, **HYPER["apart"])
        if checkpoints and reentrant:
            with pytest.raises((ApartError, RuntimeError), match="use_reentrant=False"):
                compute_loss({"x": x.requires_grad_(), "y": y})
            return
        compute_loss({"x": x, "y": y})[0].backward()
        found.append(gradients(model))
    assert_same(*found)
