"""Misuse ends in one line that says the cure, before anything is trained wrongly."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from apart_hf import ApartError, create_loss, create_strategy
from tests.support.helpers import build, snapshot

SMALL = {"apart": {"groups": 2}, "sam": {}, "standard": {}}


def loss_fn(model, part):
    return cross_entropy(model(part[0]), part[1])


def said(error):
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.parametrize(
    "given, named",
    [
        (lambda model: torch.optim.SGD(model.parameters(), lr=0.1), r"an optimizer \(SGD\)"),
        (lambda model: Accelerator(cpu=True).prepare(torch.optim.AdamW(model.parameters())), "an optimizer"),
        (lambda model: model.parameters(), "an object of type generator"),
        (lambda model: "resnet18", "an object of type str"),
        (lambda model: type(model), "an object of type type"),
        (lambda model: None, "an object of type NoneType"),
    ],
    ids=["SGD", "prepared", "parameters", "name", "class", "None"],
)
def test_what_is_no_model(given, named, method, model):
    for make in (create_strategy, functools.partial(create_loss, loss_fn=loss_fn)):
        with pytest.raises(ApartError, match=f"was given {named}.*; pass the model") as error:
            make(method, given(model))
        said(error)


def test_model_and_name_in_the_wrong_order(model):
    for make in (create_strategy, functools.partial(create_loss, loss_fn=loss_fn)):
        with pytest.raises(ApartError, match=r"was given an object of type str|the name of a method comes first"):
            make(model, "apart")
    with pytest.raises(ApartError, match=r"the name of a method comes first.* of type ByobNet"):
        create_strategy(model, model)


@pytest.mark.parametrize("method", SMALL)
def test_data_parallel(method):
    inner = build("small")
    for model in (nn.DataParallel(inner), nn.Sequential(nn.DataParallel(inner))):
        for make in (create_strategy, functools.partial(create_loss, loss_fn=loss_fn)):
            with pytest.raises(ApartError, match=r"nn\.DataParallel.*DistributedDataParallel, or one device") as error:
                make(method, model)
            said(error)


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        nn.BCEWithLogitsLoss(reduction="sum"),
        nn.KLDivLoss(reduction="sum"),
        functools.partial(cross_entropy, reduction="sum"),
        functools.partial(nn.CrossEntropyLoss(reduction="sum")),
        functools.partial(functools.partial(cross_entropy, reduction="sum"), label_smoothing=0.1),
    ],
    ids=["cross entropy", "binary", "divergence", "partial", "partial of a module", "partial of a partial"],
)
@pytest.mark.parametrize("method", ["apart", "sam"])
def test_sums_over_the_samples(criterion, method, model, data):
    before = snapshot(model)
    with pytest.raises(
        ApartError, match=r"reduction='sum', and the two passes weight means.*reduction='mean'"
    ) as error:
        create_strategy(method, model, **SMALL[method]).accumulate_gradients(*data, criterion)
    said(error)
    assert snapshot(model) == before and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["apart", "sam"])
def test_means_of_any_name_are_taken(method, model, data):
    images, targets = data
    soft = nn.functional.one_hot(targets, 5).float()
    for criterion, wanted in (
        (nn.CrossEntropyLoss(), targets),
        (nn.BCEWithLogitsLoss(), soft),
        (lambda output, soft: nn.KLDivLoss(reduction="batchmean")(output.log_softmax(1), soft), soft),
        (functools.partial(cross_entropy, label_smoothing=0.1), targets),
    ):
        create_strategy(method, model, **SMALL[method]).accumulate_gradients(images, wanted, criterion)


def results(model, part):
    output = model(part[0])
    loss = cross_entropy(output, part[1])
    return {
        "one for each sample": (cross_entropy(output, part[1], reduction="none"), r"has the shape \(8,\), .*'mean'"),
        "detached": (loss.detach(), "does not require grad.*detach nothing"),
        "a number": (loss.item(), "the loss is of type float; return a scalar tensor"),
        "a dict": ({"loss": loss}, "the loss is of type dict"),
        "nothing": (None, "the loss is of type NoneType"),
        "three values": ((loss, output, 1), "returned a tuple of 3; return loss, or"),
        "a list": ([loss, output], "the loss is of type list"),
        "aux first": ((output, loss), r"has the shape \(8, 5\)"),
    }


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.parametrize("case", results(lambda x: x, (torch.ones(8, 5), torch.ones(8).long())))
def test_losses_that_are_none(case, method, data):
    model = build("small", dtype=torch.float32)
    before, message = snapshot(model), results(model, data)[case][1]
    strategy = create_strategy(method, model, **SMALL[method])
    compute_loss = create_loss(method, model, lambda m, part: results(m, part)[case][0], **SMALL[method])
    calls = [lambda: compute_loss(data), lambda: strategy.accumulate(data, lambda part: results(model, part)[case][0])]
    if not isinstance(results(model, data)[case][0], tuple):
        first = lambda output, targets: results(lambda _: output, (None, targets))[case][0]  # noqa: E731
        calls.append(lambda: strategy.accumulate_gradients(*data, first))
    for call in calls:
        with pytest.raises(ApartError, match=message) as error:
            call()
        said(error)
    assert snapshot(model) == before and all(p.grad is None for p in model.parameters())


def test_nothing_is_trained(model, data):
    model.requires_grad_(False)
    for method in SMALL:
        with pytest.raises(ApartError, match=r"does not require grad.*requires_grad_"):
            create_strategy(method, model, **SMALL[method]).accumulate_gradients(*data, cross_entropy)


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients(off, method, model, data):
    strategy = create_strategy(method, model, **SMALL[method])
    with off(), pytest.raises(ApartError, match="gradients are off") as error:
        strategy.accumulate_gradients(*data, cross_entropy)
    said(error)


def test_a_criterion_in_the_place_of_a_loss_function(model):
    for wrong in (nn.CrossEntropyLoss(), None, "cross_entropy"):
        with pytest.raises(ApartError, match="is to be a function of model and batch") as error:
            create_loss("apart", model, wrong)
        said(error)


def test_a_model_without_batchnorm():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    for make in (create_strategy, functools.partial(create_loss, loss_fn=loss_fn)):
        for method in ("apart", "random-bn", "ghost-bn", "apart-sam"):
            with pytest.raises(ApartError, match="has no BatchNorm layer"):
                make(method, plain)
        make("sam", plain)


@pytest.mark.parametrize("method", ["apart", "random-bn", "ghost-bn"])
def test_layers_that_were_replaced_after_the_strategy_was_made(method, data):
    """The strategy would perturb layers that nothing runs through."""
    model = nn.Sequential(build("small", dtype=torch.float32))
    strategy = create_strategy(method, model, groups=2)
    model[0] = convert_sync_batchnorm(model[0])
    with pytest.raises(ApartError, match=r"layer '0\.bn1' was replaced after the strategy was made") as error:
        strategy.accumulate_gradients(*data, cross_entropy)
    said(error)


@pytest.fixture
def one_process(tmp_path):
    """A process group of one: as far as DDP goes, without the seconds that others take."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("method", SMALL)
def test_a_strategy_made_before_the_model_was_wrapped(method, data, one_process):
    model = build("small", dtype=torch.float32)
    early = create_strategy(method, model, **SMALL[method])
    early_loss = create_loss(method, model, loss_fn, **SMALL[method])
    wrapped = DistributedDataParallel(model)
    for call in (
        lambda: early.accumulate_gradients(*data, cross_entropy),
        lambda: early.accumulate(data, lambda part: loss_fn(wrapped, part)),
        lambda: early_loss(data),
    ):
        with pytest.raises(
            ApartError, match=r"made before it was wrapped.*make the strategy of the wrapped model"
        ) as error:
            call()
        said(error)
    create_strategy(method, wrapped, **SMALL[method]).accumulate_gradients(*data, cross_entropy)
    create_loss(method, wrapped, loss_fn, **SMALL[method])(data).backward()
    other = build("small", dtype=torch.float32)  # that is in no wrapper
    create_strategy(method, other, **SMALL[method]).accumulate_gradients(*data, cross_entropy)


def test_a_model_that_accelerate_has_not_prepared(model):
    class Accelerator:
        distributed_type = "DistributedType.MULTI_GPU"

        def backward(self, loss):
            loss.backward()

    with pytest.raises(ApartError, match=r"the model is not prepared.*accelerator\.prepare") as error:
        create_strategy("apart", model, accelerator=Accelerator())
    said(error)
    create_strategy("apart", copy.deepcopy(model).requires_grad_(False), accelerator=Accelerator())


def test_a_part_of_the_model_in_ddp(one_process):
    model = nn.Sequential(DistributedDataParallel(build("small")))
    with pytest.raises(ApartError, match=r"DistributedDataParallel wraps '0', a part of the model") as error:
        create_loss("apart", model, loss_fn)
    said(error)


@pytest.mark.parametrize(
    "option, cure",
    [
        ({"accelerator": Accelerator}, "ends_step=accelerator.sync_gradients"),
        ({"autocast": torch.no_grad}, "the autocast that is around the call"),
        ({"samples": 8}, r"compute_loss\(batch, samples=N\)"),
        ({"backward": None}, r"call loss\.backward\(\)"),
        ({"groupz": 2}, "no hyper-parameter 'groupz'; it has epsilon"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_a_loss_has_no_use_for(option, cure, model):
    """An accelerator was taken, and its accumulation not heeded."""
    with pytest.raises(ApartError, match=cure) as error:
        create_loss("apart", model, loss_fn, **option)
    said(error)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"generator": 3}, "generator=3 is of type int; pass a torch.Generator"),
        ({"generator": np.random.default_rng(0)}, "is of type Generator; pass a torch.Generator"),
        ({"accelerator": 3}, "accelerator=3 is of type int, which has no backward"),
        ({"autocast": torch.autocast("cpu", torch.bfloat16)}, "of type autocast; pass a function"),
    ],
    ids=["generator", "numpy", "accelerator", "autocast"],
)
def test_helpers_of_another_kind(wrong, message, model):
    makes = [create_strategy] + [functools.partial(create_loss, loss_fn=loss_fn)] * ("generator" in wrong)
    for make in makes:
        with pytest.raises(ApartError, match=message) as error:
            make("apart", model, **wrong)
        said(error)


def summed(model, part, reduction="mean"):
    return cross_entropy(model(part[0]), part[1], reduction=reduction)


@pytest.mark.parametrize("method", ["apart", "sam"])
def test_loss_functions_that_say_that_they_sum(method, model, data):
    loss_of = functools.partial(summed, reduction="sum")
    with pytest.raises(ApartError, match="reduction='sum'") as error:
        create_loss(method, model, loss_of, **SMALL[method])
    said(error)
    strategy = create_strategy(method, model, **SMALL[method])
    with pytest.raises(ApartError, match="reduction='sum'"):
        strategy.accumulate(data, functools.partial(lambda part, reduction: loss_of(model, part), reduction="sum"))
    create_loss("standard", model, loss_of)(data).backward()  # one pass has nothing to weight
    create_loss(method, model, functools.partial(summed, reduction="mean"), **SMALL[method])(data).backward()


def test_a_complex_loss(model, data):
    compute_loss = create_loss("sam", model, lambda model, part: loss_fn(model, part).to(torch.complex64))
    with pytest.raises(ApartError, match=r"the loss is complex \(torch\.complex64\)") as error:
        compute_loss(data)
    said(error)


@pytest.mark.parametrize("method", SMALL)
def test_a_model_that_is_wrapped_after_some_steps(method, data, one_process):
    """The first steps are made before; other models that are wrapped in between are nothing to it."""
    model = build("small", dtype=torch.float32)
    strategy = create_strategy(method, model, **SMALL[method])
    compute_loss = create_loss(method, model, loss_fn, **SMALL[method])
    for _ in range(2):
        strategy.accumulate_gradients(*data, cross_entropy)
        compute_loss(data).backward()
        other = DistributedDataParallel(build("small", dtype=torch.float32))
    wrapped = DistributedDataParallel(model)
    for call in (lambda: strategy.accumulate_gradients(*data, cross_entropy), lambda: compute_loss(data)):
        for _ in range(2):
            with pytest.raises(ApartError, match="made before it was wrapped") as error:
                call()
            said(error)
    create_loss(method, wrapped, loss_fn, **SMALL[method])(data).backward()
    del other
