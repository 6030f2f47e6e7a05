"""The two passes as a loss: what its backward adds is the strategy's gradient, in loops that own the backward."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf import ApartError, create_loss, create_strategy
from tests.reference import reference_step
from tests.support.helpers import assert_same, batch, build, gradients, snapshot

HYPER = {
    "standard": {},
    "apart": {"groups": 2},
    "sam": {"rho": 0.1},
    "apart-sam": {"groups": 2, "rho": 0.2},
    "random-bn": {"groups": 2},
}
CASES = [(method, ratio) for method in HYPER for ratio in (1, 0.5) if ratio == 1 or HYPER[method].get("groups")]


def loss_fn(model, part):
    output = model(part["x"])
    return cross_entropy(output, part["y"]), output


def hyper(method, ratio=1):
    return HYPER[method] | ({} if ratio == 1 else {"ratio": ratio})


def autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def trained(way, method, ratio, dtype, layout=torch.contiguous_format, steps=3):
    """Weights, buffers and losses of a few steps with momentum."""
    model = build("small", dtype=torch.float32).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options = {"generator": torch.Generator().manual_seed(3)} | hyper(method, ratio)
    if way == "create_loss":
        compute_loss = create_loss(method, model, loss_fn, **options)
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
            loss, output = strategy.accumulate(part, lambda part: loss_fn(model, part))
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
        compute_loss = create_loss(method, model, loss_fn, generator=generators[1], **hyper(method, ratio))
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
        compute_loss = create_loss(method, model, loss_fn, **HYPER[method])
        for way, (x, y) in zip(ways.split(), parts):
            if way == "plain":
                strategy.accumulate_gradients(x, y, cross_entropy, backward=lambda loss: (loss / 3).backward())
            else:
                (compute_loss({"x": x, "y": y})[0] / 3).backward()
        found.append(gradients(model))
    assert_same(*found, tolerance=1e-14)


@pytest.mark.parametrize(
    "method, bad",
    [("standard", None), ("standard", 1), *((m, bad) for m in ("apart", "sam", "apart-sam") for bad in (None, 1, 2))],
)
def test_gradient_scaler(method, bad):
    """Steps are those without a scaler, bit for bit; an overflow in pass `bad` skips one, and lowers the scale."""
    found = []
    for scaled in (False, True):
        model, calls = build("small", dtype=torch.float32), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)

        def overflowing(model, part, calls=calls):
            calls.append(1)
            loss, output = loss_fn(model, part)
            return loss * (torch.inf if len(calls) == bad else 1.0), output

        compute_loss = create_loss(method, model, overflowing, **HYPER[method])
        states = [copy.deepcopy(model.state_dict())]
        for step in range(3):
            x, y = batch(8, 8, seed=step, dtype=torch.float32)
            loss, _ = compute_loss({"x": x, "y": y})
            scaler.scale(loss).backward()
            if scaled:
                scaler.step(optimizer)
                scaler.update()
            elif step or bad is None:
                optimizer.step()
            optimizer.zero_grad()
            states.append(copy.deepcopy(model.state_dict()))
        found.append(states)
    for one, two in zip(*found):
        assert_same(one, two, tolerance=0)
    moved = not torch.equal(found[1][0]["fc.weight"], found[1][1]["fc.weight"])
    assert moved == (bad is None) and scaler.get_scale() == 2.0 ** (10 if bad is None else 9)


@pytest.mark.parametrize("method", HYPER)
def test_nothing_is_left_on_the_model(method, model, data):
    before = snapshot(model)
    compute_loss = create_loss(method, model, loss_fn, **HYPER[method])
    weights = copy.deepcopy(dict(model.named_parameters()))
    loss, _ = compute_loss({"x": data[0], "y": data[1]})
    assert snapshot(model) == before and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    loss.backward()
    assert snapshot(model) == before
    pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("fails_in_call", [1, 2])
@pytest.mark.parametrize("method", ["apart", "sam", "apart-sam", "random-bn"])
@pytest.mark.parametrize("where", ["loss function", "model", "backward"])
def test_nothing_is_left_after_an_exception(where, method, fails_in_call, data):
    """Gradients that were there are there still, as the same tensors."""
    model, calls = build("small", dtype=torch.float32), []

    def fail(*_):
        calls.append(1)
        if len(calls) == fails_in_call:
            raise RuntimeError("of the user")

    def failing(model, part):
        loss, output = loss_fn(model, part)
        if where == "loss function":
            fail()
        if where == "backward":
            loss.register_hook(fail)
        return loss, output

    if where == "model":
        model.conv2.register_forward_hook(fail)
    compute_loss = create_loss(method, model, failing, **HYPER[method])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, there = snapshot(model), [p.grad for p in model.parameters()]
    weights = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match="of the user"):
        compute_loss({"x": data[0], "y": data[1]})
    assert snapshot(model) == before and len(calls) == fails_in_call
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(p.grad is g and torch.equal(g, torch.ones_like(g)) for p, g in zip(model.parameters(), there))
    assert compute_loss.strategy.steps == 0
    compute_loss({"x": data[0], "y": data[1]})[0].backward()  # and it goes on


@pytest.mark.parametrize("method", ["apart", "sam"])
def test_p_grad_stays_none_where_a_plain_step_leaves_it(method):
    """Parameters that are frozen, or unused; earlier gradients are added to in place."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.unused = build("small"), nn.Linear(2, 2).double()
            self.inner.bn1.bias.requires_grad_(False)

        def forward(self, x):
            return self.inner(x)

    model, (x, y) = Net(), batch(8, 8)
    compute_loss = create_loss(method, model, loss_fn, **HYPER[method])
    compute_loss({"x": x, "y": y})[0].backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == {
        "inner.bn1.bias",
        "unused.weight",
        "unused.bias",
    }
    there = model.inner.fc.weight.grad
    once = there.clone()
    compute_loss({"x": x, "y": y})[0].backward()
    assert model.inner.fc.weight.grad is there and torch.equal(there, 2 * once)


def test_the_loss_is_one_term_among_others():
    """Its weight, and a penalty in plain torch, are those of any sum."""
    model, (x, y) = build("small"), batch(8, 8)
    want, _, _ = reference_step(model, x, y, cross_entropy, "apart", **HYPER["apart"])
    loss, _ = create_loss("apart", model, loss_fn, **HYPER["apart"])({"x": x, "y": y})
    (0.3 * loss + sum(p.square().sum() for p in model.parameters()) / 2).backward()
    assert_same(gradients(model), {n: 0.3 * g + dict(model.named_parameters())[n].detach() for n, g in want.items()})


@pytest.mark.parametrize("method", ["apart", "sam", "apart-sam"])
def test_terms_whose_graphs_are_still_open(method):
    """A plain loss and a plain step's, computed before the two passes and differentiated after them."""
    model, (x, y), (other, labels) = build("small"), batch(8, 8), batch(8, 8, seed=2)
    compute_loss = create_loss(method, model, loss_fn, every=2, **HYPER[method])
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
    compute_loss = create_loss(method, model, loss_fn, **HYPER[method])
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
    compute_loss = create_loss("sam", model, loss_fn)
    compute_loss({"x": x, "y": y})
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["standard", "apart", "sam"])
def test_in_eval_mode_and_without_gradients_it_is_the_plain_loss(method):
    model, (x, y), calls = build("small"), batch(8, 8), []

    def counted(model, part):
        calls.append(part)
        return loss_fn(model, part)

    compute_loss = create_loss(method, model, counted, **HYPER[method])
    uneven = {"x": x[:7], "y": y[:7]}  # fits no groups
    model.eval()
    loss, output = compute_loss(uneven)
    want = loss_fn(model, uneven)
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
    create_loss(method, model, loss_fn, **HYPER[method])({"x": data[0], "y": data[1]})[0].backward()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers()))


def warm(model, part, temperature):
    return cross_entropy(model(part[0]) / temperature, part[1])


def beside(way, method, x, y):
    """The gradients of a model, of a temperature in the loss function, and of images, all times a quarter."""
    model, images = build("small"), x.clone().requires_grad_()
    temperature = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    if way == "create_loss":
        loss = create_loss(method, model, lambda m, part: warm(m, part, temperature), **HYPER[method])((images, y))
        assert temperature.grad is None and images.grad is None
        (0.25 * loss).backward()
    else:
        strategy = create_strategy(method, model, **HYPER[method])
        quarter = lambda loss: (0.25 * loss).backward()  # noqa: E731
        strategy.accumulate((images, y), lambda part: warm(model, part, temperature), backward=quarter)
    return gradients(model) | {"temperature": temperature.grad, "images": images.grad}


@pytest.mark.parametrize("method", ["standard", "apart", "sam", "apart-sam"])
def test_what_is_trained_beside_the_model(method):
    """It gets its gradient once, and scaled; by SAM, which keeps none of the clean pass, that of the perturbed one."""
    x, y = batch(8, 8)
    want = beside("accumulate", method, x, y)
    assert_same(beside("create_loss", method, x, y), want, tolerance=1e-14)
    if method == "sam":
        model, temperature = build("small"), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        clean = torch.autograd.grad(warm(model, (x, y), temperature), list(model.parameters()))
        norm = torch.sqrt(sum(g.square().sum() for g in clean))
        with torch.no_grad():
            for p, g in zip(model.parameters(), clean):
                p += HYPER["sam"]["rho"] * g / norm
        (0.25 * warm(model, (x, y), temperature)).backward()
        assert torch.allclose(temperature.grad, want["temperature"], rtol=1e-10)


class Stored(torch.autograd.Function):
    """Its gradient is a tensor that the caller keeps."""

    @staticmethod
    def forward(ctx, p, stored):
        ctx.stored = stored
        return (p * stored).sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.stored, None


@pytest.mark.parametrize("method", ["apart", "sam"])
def test_gradients_that_share_their_memory(method):
    """Of two parameters that are added, and of one whose gradient somebody else holds."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("small")
            self.a, self.b, self.c = (nn.Parameter(torch.zeros(5).double()) for _ in range(3))
            self.stored = torch.ones(5).double()

        def forward(self, x):
            return self.inner(x) + (self.a + self.b) + Stored.apply(self.c, self.stored)

    found, (x, y) = [], batch(8, 8)
    for way in ("accumulate", "create_loss"):
        model = Net()
        if way == "accumulate":
            create_strategy(method, model, **HYPER[method]).accumulate_gradients(x, y, cross_entropy)
        else:
            create_loss(method, model, loss_fn, **HYPER[method])({"x": x, "y": y})[0].backward()
        assert torch.equal(model.stored, torch.ones(5).double())
        found.append(gradients(model))
    assert_same(*found, tolerance=0)


def test_hooks_that_step_an_optimizer_see_the_finished_gradient():
    """torch's post-accumulate hooks, which fused optimizers step in, fire once a backward."""
    model, (x, y) = build("small"), batch(8, 8)
    want, _, _ = reference_step(model, x, y, cross_entropy, "apart", **HYPER["apart"])
    seen = {}
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.setdefault(name, []).append(p.grad.clone()))
    loss, _ = create_loss("apart", model, loss_fn, **HYPER["apart"])({"x": x, "y": y})
    assert not seen
    loss.backward()
    assert all(len(found) == 1 for found in seen.values())
    assert_same({name: found[0] for name, found in seen.items()}, want)


def test_small_gradients_of_float16_do_not_vanish():
    """Inner passes are scaled: the clean gradient is of float16's smallest numbers, which alone would be zero."""

    def faint(model, part):
        return cross_entropy(model(part["x"]), part["y"]) * 2.0**-20

    found = []
    for half in (False, True):
        model = build("test_byobnet", dtype=torch.float32)
        x, y = batch(16, 32, dtype=torch.float32)
        compute_loss = create_loss("sam", model, faint, rho=0.0)
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = compute_loss({"x": x, "y": y})
        (loss * 2.0**20).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert ("scale" in compute_loss.state_dict()) == half
    assert torch.cosine_similarity(*found, dim=0) > 0.999


def test_an_overflow_of_float16_lowers_the_scale_and_is_handed_on():
    model, (x, y) = build("test_byobnet", dtype=torch.float32), batch(8, 16, dtype=torch.float32)
    sizes = iter([1.0, 2.0**20, 1.0])  # of the loss, in the clean pass and the perturbed pass of the first step
    compute_loss = create_loss("sam", model, lambda m, p: cross_entropy(m(p["x"]), p["y"]) * next(sizes, 1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scales = []
    for _ in range(2):
        before = copy.deepcopy(dict(model.named_parameters()))
        with torch.autocast("cpu", torch.float16):
            loss = compute_loss({"x": x, "y": y})
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(compute_loss.state_dict()["scale"][0])
        skipped = all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert skipped == (len(scales) == 1)
    assert scales == [2.0**11, 2.0**11]
    other = create_loss("sam", model, loss_fn)
    other.load_state_dict(compute_loss.state_dict())
    assert other.state_dict() == compute_loss.state_dict()


def test_both_passes_are_freed_with_the_loss():
    """What a pass computes is gone once its gradient is there, also where the loss is kept."""
    model, (x, y), seen = build("small"), batch(8, 8), []

    def watched(model, part):
        loss, output = loss_fn(model, part)
        seen.append(weakref.ref(output))
        return loss

    loss = create_loss("apart", model, watched, **HYPER["apart"])({"x": x, "y": y})
    gc.collect()
    assert len(seen) == 2 and all(output() is None for output in seen)
    loss.backward()


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
            compute_loss = create_loss("apart", network, loss_fn, groups=2)
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
        compute_loss = create_loss("apart", model, loss_fn, **HYPER["apart"])
        if checkpoints and reentrant:
            with pytest.raises((ApartError, RuntimeError), match="use_reentrant=False"):
                compute_loss({"x": x.requires_grad_(), "y": y})
            return
        compute_loss({"x": x, "y": y})[0].backward()
        found.append(gradients(model))
    assert_same(*found)
