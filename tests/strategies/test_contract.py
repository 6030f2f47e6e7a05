"""What callers rely on besides the numbers: nothing is left on the model, bad input is refused, NaN goes nowhere."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apart_hf import ApartError, create_strategy
from apart_hf.batchnorm.functional import perturbed_batch_norm
from apart_hf.batchnorm.layouts import Grouping
from tests.reference import reference_step
from tests.support.helpers import Tokens, assert_same, batch, build, gradients, snapshot

SMALL = {"standard": {}, "apart": {"groups": 2}, "sam": {}, "apart-sam": {"groups": 2}, "gsam": {}, "awp": {}}
PERTURBED = [method for method in SMALL if method != "standard"]


@pytest.mark.parametrize("method", SMALL)
def test_nothing_is_left_on_the_model(method, model, data):
    before, weights = snapshot(model), copy.deepcopy(dict(model.named_parameters()))
    create_strategy(method, model, **SMALL[method]).accumulate_gradients(*data, cross_entropy)
    assert snapshot(model) == before
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("fails_in_call", [1, 2])
@pytest.mark.parametrize("method", PERTURBED)
def test_nothing_is_left_after_an_exception(method, fails_in_call, model, data):
    before, weights = snapshot(model), copy.deepcopy(dict(model.named_parameters()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    calls = []

    def criterion(output, targets):
        calls.append(1)
        if len(calls) == fails_in_call:
            raise RuntimeError("user's criterion")
        return cross_entropy(output, targets)

    with pytest.raises(RuntimeError, match="user's criterion"):
        create_strategy(method, model, **SMALL[method]).accumulate_gradients(*data, criterion)
    assert snapshot(model) == before
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    if fails_in_call == 1 or "apart" not in method:  # the gradients that were there are there still
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


@pytest.mark.parametrize("method", SMALL)
def test_returns_loss_and_output_of_the_clean_pass_detached(method, model, data):
    plain = copy.deepcopy(model)
    want_output = plain(data[0])
    loss, output = create_strategy(method, model, **SMALL[method]).accumulate_gradients(*data, cross_entropy)
    assert not loss.requires_grad and not output.requires_grad
    assert torch.equal(output, want_output) and torch.equal(loss, cross_entropy(want_output, data[1]))


def test_outputs_by_name_are_detached(data):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("test_byobnet", dtype=torch.float32)

        def forward(self, x):
            return {"logits": self.inner(x), "more": (self.inner(x),)}

    strategy = create_strategy("apart", Named().train(), groups=2)
    _, output = strategy.accumulate_gradients(*data, lambda output, targets: cross_entropy(output["logits"], targets))
    assert not output["logits"].requires_grad and not output["more"][0].requires_grad


@pytest.mark.parametrize("method", PERTURBED)
def test_perturb_false_is_a_plain_step_in_one_pass(method, model, data):
    plain = copy.deepcopy(model)
    cross_entropy(plain(data[0]), data[1]).backward()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    create_strategy(method, model, **SMALL[method]).accumulate_gradients(*data, cross_entropy, perturb=False)
    assert len(passes) == 1
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters()))


def test_the_second_pass_takes_the_first_of_a_random_permutation(model, data):
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    generator = torch.Generator().manual_seed(3)
    create_strategy("apart", model, generator=generator, groups=2, ratio=0.5).accumulate_gradients(*data, cross_entropy)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(seen[1], data[0][order[:4]])


def test_state_goes_on_where_it_was(model, data):
    def run(strategy):
        strategy.accumulate_gradients(*data, cross_entropy)
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    make = lambda: create_strategy("apart", model, generator=torch.Generator().manual_seed(3), groups=2, ratio=0.5)  # noqa: E731
    first = make()
    run(first)
    state, buffers = copy.deepcopy(first.state_dict()), copy.deepcopy(model.state_dict())
    model.zero_grad()
    want = run(first)
    model.load_state_dict(buffers)
    model.zero_grad()
    second = make()
    second.load_state_dict(state)
    assert_same(run(second), want, tolerance=0)
    with pytest.raises(ApartError, match="generator"):
        create_strategy("apart", model, groups=2).load_state_dict(state)


@pytest.mark.parametrize("method", PERTURBED)
def test_grad_scaler_in_ones_own_loop(method):
    """A scale changes nothing, bit for bit (it is a power of two), and gradients need no unscaling between passes."""
    data = batch(8, dtype=torch.float32)
    results = []
    for scaled in (False, True):
        model = build("test_byobnet", dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        strategy = create_strategy(method, model, **SMALL[method])
        for _ in range(2):
            backward = lambda loss, s=scaler: s.scale(loss).backward()  # noqa: E731
            strategy.accumulate_gradients(*data, cross_entropy, backward=backward)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(model.state_dict())
    assert_same(*results, tolerance=0 if method == "apart" else 1e-5)  # others divide by a norm


@pytest.mark.parametrize("overflows_in", [1, 2])
@pytest.mark.parametrize("method", PERTURBED)
def test_an_overflow_in_either_pass_skips_the_step(method, overflows_in, model, data):
    weights, plain = copy.deepcopy(dict(model.named_parameters())), copy.deepcopy(model)
    plain(data[0])  # what a skipped standard step leaves in the buffers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    strategy, calls = create_strategy(method, model, **SMALL[method]), []

    def backward(loss):
        calls.append(1)
        scaler.scale(loss * (float("inf") if len(calls) == overflows_in else 1.0)).backward()

    strategy.accumulate_gradients(*data, cross_entropy, backward=backward)
    scaler.step(optimizer)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers()))
    for perturbation in strategy.perturbations:
        if hasattr(perturbation, "_deltas") and overflows_in == 1:
            assert not perturbation._deltas.any()


def test_autocast_is_entered_for_the_forwards_only(model, data):
    inside = []

    def criterion(output, targets):
        inside.append(torch.is_autocast_enabled("cpu"))
        return cross_entropy(output.float(), targets)

    def backward(loss):
        inside.append(torch.is_autocast_enabled("cpu"))
        loss.backward()

    strategy = create_strategy("apart", model, groups=2, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    _, output = strategy.accumulate_gradients(*data, criterion, backward=backward)
    assert inside == [True, False, True, False] and output.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_activations_keep_their_dtype_in_the_perturbed_pass(model, data):
    dtypes = []
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.register_forward_hook(lambda _, args, out: dtypes.append((args[0].dtype, out.dtype)))
    strategy = create_strategy("apart", model, groups=2, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    strategy.accumulate_gradients(*data, cross_entropy)
    assert dtypes and all(pair == (torch.bfloat16, torch.bfloat16) for pair in dtypes)


def test_gradient_checkpointing_gives_the_same_gradients():
    data, grads = batch(8, dtype=torch.float64), []
    for checkpointing in (False, True):
        model = build("resnet18")
        model.set_grad_checkpointing(checkpointing)
        create_strategy("apart", model, groups=2).accumulate_gradients(*data, cross_entropy)
        grads.append(gradients(model))
    assert_same(*grads)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(
    "name, options",
    [("test_efficientnet", {}), ("efficientnet_b0", {"drop_rate": 0.0}), ("levit_128s", {"img_size": 64})],
)
def test_dead_zone_sets_structural_zeros_aside(name, options, layout):
    """Linear bottlenecks read only by further BN layers: without the rule float32 and float64 attack differently."""
    attacks, sizes = [], []
    for dtype in (torch.float32, torch.float64):
        model = build(name, dtype=dtype, **options).to(memory_format=layout)
        images, targets = batch(16, 64, dtype=dtype)
        strategy = create_strategy("apart", model, groups=2)
        strategy.accumulate_gradients(images.contiguous(memory_format=layout), targets, cross_entropy)
        (statistics,) = strategy.perturbations
        attacks.append(statistics._deltas.double().sign())
        sizes.append(statistics._gradient().abs().double())
    largest = torch.zeros(len(statistics.layers)).double().scatter_reduce_(0, statistics._layer_of, sizes[1], "amax")
    structural = sizes[1] <= 1e-11 * largest[statistics._layer_of]
    assert structural.double().mean() > 0.01 and not attacks[0][structural].any()
    assert (attacks[0] != attacks[1]).double().mean() < 0.001


def test_rows_per_sample_stay_in_their_sample_s_group():
    """Tokens and windows: dim 0 is samples x rows. The same network with samples apart gives the oracle's answer."""
    torch.manual_seed(0)
    model, (images, targets) = Tokens().double(), batch(8, 8)
    want, _, _ = reference_step(model, images, targets, cross_entropy, "apart", epsilon=0.2, groups=4)
    create_strategy("apart", model, epsilon=0.2, groups=4).accumulate_gradients(images, targets, cross_entropy)
    assert_same(gradients(model), want)


@pytest.mark.skipif(torch.__version__ < (2, 14), reason="torch 2.6 compiles the passes anew at every call")
def test_compiled_models_keep_two_training_graphs():
    """One for each pass; fresh tensors or closures would recompile at every step."""
    model, graphs = build("test_resnet", dtype=torch.float32), []

    def backend(graph, _):
        graphs.append(1)
        return graph.forward

    torch._dynamo.reset()
    strategy = create_strategy("apart", torch.compile(model, backend=backend, fullgraph=True), groups=2)
    images, targets = batch(8, dtype=torch.float32)
    for _ in range(2):
        strategy.accumulate_gradients(images, targets, cross_entropy)
    settled = len(graphs)
    eager = copy.deepcopy(model)
    for one in (model, eager):
        one.zero_grad()
    for _ in range(5):
        strategy.accumulate_gradients(images, targets, cross_entropy)
    reference = create_strategy("apart", eager, groups=2)
    for _ in range(5):
        reference.accumulate_gradients(images, targets, cross_entropy)
    assert len(graphs) == settled
    assert_same(gradients(model), gradients(eager), tolerance=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["apart", "sam"])
def test_running_statistics_of_other_layers_advance_once(method):
    from timm.layers import EvoNorm2dB0

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), EvoNorm2dB0(8), nn.Flatten(1), nn.LazyLinear(5))
    images, targets = batch(8, 8, dtype=torch.float32)
    model(images)
    model.train()
    plain = copy.deepcopy(model)
    cross_entropy(plain(images), targets).backward()
    create_strategy(method, model, **SMALL[method]).accumulate_gradients(images, targets, cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers()))


def test_bfloat16_parameters(data):
    """A layer in bfloat16 agrees with float64 but for its rounding, and a whole model in bfloat16 can be attacked."""
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        g = torch.Generator().manual_seed(0)
        x, *rest = (
            torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
            for shape in ((8, 4, 6, 6), (4,), (4,), (4,), (4,))
        )
        out = perturbed_batch_norm(x, *rest, eps=1e-5, grouping=Grouping(2))
        (out * torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype)).sum().backward()
        results.append([out.double(), *(t.grad.double() for t in (x, *rest))])
        assert out.dtype == dtype
    for exact, rounded in zip(*results):
        assert (exact - rounded).norm() < 0.03 * exact.norm()
    model = build("test_resnet", dtype=torch.bfloat16)
    create_strategy("apart-sam", model, groups=2).accumulate_gradients(data[0].bfloat16(), data[1], cross_entropy)
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())
