"""Arguments of transformers' Trainer: flags, and what is refused."""

import importlib
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import HfArgumentParser, Trainer

from apart_hf import METHODS, ApartError
from apart_hf.integrations.transformers import ApartMixin, ApartTrainer, ApartTrainingArguments
from apart_hf.integrations.transformers_arguments import method_options
from tests.support.helpers import assert_same
from tests.support.loops import HYPER, batches, by_strategy
from tests.support.transformers_trainer import Keywords, OurTrainer, own_loss, trained


def test_arguments_are_flags(capsys):
    flags = "--output_dir output --apart_method apart-asam --apart_epsilon 0.2 --apart_groups 4 --apart_ratio 0.5"
    flags += " --apart_rho 0.3 --apart_eta 0.02 --apart_every 2 --apart_uneven plain"
    parser = HfArgumentParser(ApartTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(flags.split())
    assert (
        vars(args).items()
        >= {
            "apart_method": "apart-asam",
            "apart_epsilon": 0.2,
            "apart_groups": 4,
            "apart_ratio": 0.5,
            "apart_rho": 0.3,
            "apart_eta": 0.02,
            "apart_every": 2,
            "apart_uneven": "plain",
        }.items()
    )
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    said = capsys.readouterr().out
    assert "Radius of the perturbation of BatchNorm's statistics" in said and "--apart_uneven {error,plain,fit}" in said
    assert all(method in said for method in HYPER)
    with pytest.raises(SystemExit):  # argparse's own line rather than a traceback
        parser.parse_args_into_dataclasses(["--output_dir", "output", "--apart_method", "aprat"])
    said = capsys.readouterr().err
    assert "argument --apart_method/--apart-method: invalid choice: 'aprat'" in said and "'apart-sam'" in said
    again = parser.parse_dict(args.to_dict() | {"output_dir": "output"})[0]
    assert again.apart_rho == 0.3


OPTIONS = [(method, key) for method, one in METHODS.items() for key, v in one.hyper_parameters().items() if v is False]


@pytest.mark.parametrize("method, option", OPTIONS)
def test_every_option_is_a_flag_that_is_off(method, option):
    """And every number is one; an option that a method lacks is refused only where it is on."""
    fields = ApartTrainingArguments.__dataclass_fields__
    assert all(f"apart_{key}" in fields for key in METHODS[method].hyper_parameters())
    parser = HfArgumentParser(ApartTrainingArguments)
    flags = ["--output_dir", "output", "--apart_method", method]
    (off,), (on,) = (parser.parse_args_into_dataclasses(flags + more) for more in ([], [f"--apart_{option}"]))
    assert option not in method_options(off) and method_options(on)[option] is True
    with pytest.raises(ApartError, match=f"method 'standard' has no hyper-parameter '{option}'"):
        parser.parse_args_into_dataclasses([*flags[:-1], "standard", f"--apart_{option}"])


def test_bad_input(arguments):
    parts = batches(8)
    with pytest.raises(ApartError, match="did you mean 'apart'"):
        arguments("sam", apart_method="aprat", apart_rho=None)
    with pytest.raises(ApartError, match="method 'sam' has no hyper-parameter 'groups'; it has rho, global_norm"):
        arguments("sam", apart_groups=4)
    with pytest.raises(ApartError, match=r"\(TrainingArguments\) have no apart_method; use ApartTrainingArguments"):
        ApartTrainer(Keywords(), arguments())
    for wrong, said in (
        ({"apart_epsilon": -1.0}, "epsilon=-1.0: the radius must be a finite number >= 0"),
        ({"apart_ratio": 2.0}, "ratio=2.0: N/M"),
        ({"apart_every": 0}, "every=0: the second pass"),
        ({"apart_uneven": "maybe"}, "uneven='maybe': choose"),
    ):
        with pytest.raises(ApartError, match=said):
            ApartTrainer(Keywords(), arguments("apart", **wrong))
    model = Keywords()
    model.net.bn2 = type("FrozenBatchNorm", (nn.BatchNorm2d,), {"forward": lambda self, x: x})(8)
    with pytest.raises(ApartError, match=r"BatchNorm layer 'net\.bn2' is a FrozenBatchNorm"):
        ApartTrainer(model, arguments("apart"))
    for wrong in (torch.optim.SGD(Keywords().parameters(), lr=0.1), "resnet18"):
        for how in ({"model": wrong, "args": arguments("apart")}, None):
            with pytest.raises(ApartError, match=r"a strategy is made for a model .* pass the model"):
                ApartTrainer(**how) if how else ApartTrainer(wrong, arguments("apart"))
    with pytest.raises(ApartError, match="names ApartMixin after a trainer"):
        type("Late", (Trainer, ApartMixin), {})

    class Lonely(ApartTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

    with pytest.raises(ApartError, match=r"does not call super\(\)\.training_step"):
        trained(Lonely, Keywords(), arguments("apart"), parts)

    class WithWeights(ApartTrainer):
        def get_batch_samples(self, *args):
            samples, items = super().get_batch_samples(*args)
            return [part | {"class_weights": torch.ones(5)} for part in samples], items

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            weights = inputs.pop("class_weights")
            return cross_entropy(model(inputs["pixel_values"]).logits, inputs["labels"], weights)

    with pytest.raises(ApartError, match=r"5 and 8 rows, .* override count_samples\(inputs\) of the trainer"):
        trained(WithWeights, Keywords(), arguments("apart", 0.5), parts)
    WithWeights.count_samples = lambda self, inputs: len(inputs["labels"])
    model, plain = Keywords(), Keywords()
    WithWeights.__bases__ = (OurTrainer,)
    trained(WithWeights, model, arguments("apart", 0.5), parts)
    by_strategy(plain, "apart", parts, own_loss(plain), groups=2, ratio=0.5)
    assert_same(model.state_dict(), plain.state_dict(), tolerance=0)


def test_without_transformers(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("apart_hf.integrations.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for kind in (ApartError, ImportError):
        with pytest.raises(kind, match=r"^transformers is not installed; pip install 'apart-hf\[transformers\]'\.$"):
            importlib.import_module("apart_hf.integrations.transformers")
