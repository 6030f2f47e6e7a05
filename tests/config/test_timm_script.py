"""timm's own commands and flags, as facts: each is taken, or refused with a reason; and docs/TIMM.md is true."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from apart_hf import ApartError
from apart_hf.cli.train import main
from apart_hf.config.arguments import parse_arguments
from apart_hf.config.checks import check_names
from apart_hf.config.defaults import fill_defaults
from apart_hf.config.timm_flags import REFUSED, REFUSED_VALUES
from apart_hf.config.train_config import SETTINGS, TrainConfig
from apart_hf.data import DATASETS, find_dataset
from apart_hf.data.dataset_names import without_prefix
from tests.support.helpers import ROOT

FACTS = json.loads((Path(__file__).parent / "timm_script.json").read_text())
OURS = {flag for setting in SETTINGS.values() for flag in (setting.flag, *setting.flags)}
DOCUMENT = (ROOT / "docs/TIMM.md").read_text()
REFUSED_COMMANDS = {"resnet50": "--aug-splits"}  # the first of its flags that is not taken


def flags_of(command):
    """What follows the script and the number of processes; one command of the documentation has a slash too many."""
    words = shlex.split(command.replace("/--data-dir imagenet/", "--data-dir /imagenet/"))
    assert words[0] == "./distributed_train.sh" and words[1].isdecimal()
    return words[2:]


def model_of(command):
    return re.search(r"--model (\S+)", command)[1]


@pytest.mark.parametrize("command", FACTS["commands"], ids=model_of)
def test_timm_s_commands(command, capsys):
    arguments = flags_of(command)
    if model_of(command) in REFUSED_COMMANDS:
        with pytest.raises(SystemExit) as stop:
            parse_arguments(arguments)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1
        assert f"{REFUSED_COMMANDS[model_of(command)]} of timm is not taken: " in said
        return
    config = parse_arguments(arguments)
    check_names(config)  # models and optimizers are there
    filled = fill_defaults(config)
    given = dict(re.findall(r"--([a-z-]+) ([\d.e-]+)(?= --| -|$)", " ".join(arguments)))
    assert len(given) >= 5
    for flag, value in given.items():
        assert getattr(filled, flag.replace("-", "_")) == float(value), flag
    assert filled.remode == "pixel" and filled.sched in ("cosine", "step") and filled.model == model_of(command)


@pytest.mark.parametrize("model", ["mobilenetv3_large_100", "resnext50_32x4d"])
def test_a_command_trains(model, little, tmp_path, capsys):
    """All of its flags at once, on a small network and few images."""
    (command,) = [one for one in FACTS["commands"] if model_of(one) == model]
    small = f"--model test_efficientnet -b 8 -j 0 --epochs 6 --max-steps 2 --groups 2 --data-dir {little} --output"
    main([*flags_of(command), *small.split(), str(tmp_path), "--experiment", "run"])
    record = json.loads((tmp_path / "run/last/config.json").read_text())["apart"]["settings"]
    assert record["reprob"] == (0.2 if model.startswith("mobile") else 0.4) and record["amp_dtype"] == "bfloat16"
    assert "2.4" in command or record["recount"] == 3


def test_there_are_nine_and_eight_are_taken():
    assert len(FACTS["commands"]) == 9 and len({model_of(command) for command in FACTS["commands"]}) == 9
    assert "8 of 9" in DOCUMENT


def test_every_flag_of_timm_s_script_is_taken_or_refused():
    for flag, known in FACTS["flags"].items():
        assert flag in OURS or flag in REFUSED, flag
        for other in known["also"]:
            assert other in OURS or other in REFUSED, other
    assert not OURS & set(REFUSED)


@pytest.mark.parametrize("flag", REFUSED)
def test_a_refused_flag_ends_in_one_line_with_its_reason(flag, capsys):
    for arguments in ([flag, "1"], [f"{flag}=1"], ["--model", "resnet18", flag]):
        with pytest.raises(SystemExit) as stop:
            parse_arguments(arguments, prog="apart-hf train")
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1
        assert said.startswith(f"apart-hf train: error: {flag} of timm is not taken: {REFUSED[flag]} (")
    named = re.findall(r"(?<![\w-])--[a-z-]+", REFUSED[flag])
    assert set(named) <= OURS, named  # what it sends users to is there


def test_help_is_given_beside_a_refused_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--jsd-loss", "--help"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("usage: ")


def rows(title):
    (text,) = re.findall(rf"^### {title}\n(.*?)(?=^##|\Z)", DOCUMENT, re.M | re.S)
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ][1:]


def test_the_documented_refusals_are_those_of_the_code():
    found = {flag: reason for cell, reason in rows("Not taken") for flag in re.findall(r"`([^`]+)`", cell)}
    assert found == REFUSED


def usual(setting):
    """What is taken where a setting is not given, in words where others decide it."""
    return str(setting.default) if setting.default is not None else re.search(r"\[([^\];,]*)", setting.help)[1]


def test_the_documented_defaults_are_timm_s_and_ours():
    found = {cell.strip("`"): (theirs, ours) for cell, theirs, ours in rows("Other defaults")}
    for flag, (theirs, ours) in found.items():
        default = FACTS["flags"][flag]["default"]
        default = " ".join(map(str, default)) if isinstance(default, list) else default
        assert theirs.strip("`") == str(default), flag
        assert ours.strip("`") == usual(SETTINGS[flag.removeprefix("--").replace("-", "_")]), flag
    for flag, known in FACTS["flags"].items():  # and none is forgotten
        setting = SETTINGS.get(flag.removeprefix("--").replace("-", "_"))
        theirs = known["default"]
        if setting is None or theirs in ("", None, False) or setting.default == theirs or flag in found:
            continue
        assert flag in DOCUMENT or usual(setting) in ("found", str(theirs)), (flag, theirs, setting.default)


def test_every_difference_names_flags_that_both_have():
    for cell, *_ in rows("The same flag, another meaning"):
        flags = re.findall(r"--[a-z-]+", cell)
        assert flags and set(flags) <= OURS & set(FACTS["flags"]), cell


@pytest.mark.parametrize("name", ["/x", "x/", "a//b", "/data/imagenet", "/"])
def test_names_of_which_a_part_is_missing(name):
    with pytest.raises(ApartError, match="needs a Hub id, user/name; a folder of yours is --data-dir FOLDER"):
        check_names(TrainConfig(dataset=name))


def test_a_schedule_that_counts_in_its_warmup():
    assert fill_defaults(parse_arguments(["--sched", "rsqrt", "--warmup-epochs", "2", "--epochs", "5"])).run_epochs == 5


@pytest.mark.parametrize(
    "name, message",
    [
        ("hfds/user", "needs a Hub id"),
        ("hfds/a/b/c", "needs a Hub id"),
        ("hfds//x", "needs a Hub id, hfds/user/name; a folder of yours is --data-dir FOLDER"),
        ("hfds/a/", "needs a Hub id"),
        ("hfds/", "needs a Hub id"),
        ("hfids/user/name", "streams are --dataset user/name --streaming"),
        ("torch/cifar10", "--dataset cifar10, or --data-dir FOLDER"),
        ("torch/fashion_mnist", "--dataset fashion-mnist"),
        ("torch/image_folder", "--data-dir FOLDER with one folder of images a class, without --dataset"),
        ("torch/places365", "use a Hub id user/name"),
        ("wds/shards", "--data-dir FOLDER without --dataset"),
        ("tfds/cifar10", "use a Hub id user/name"),
    ],
)
def test_kinds_of_datasets_that_are_not_read(name, message, tmp_path):
    for folder in (None, str(tmp_path)):
        with pytest.raises(ApartError, match=message) as error:
            check_names(TrainConfig(dataset=name, data_dir=folder))
        assert str(error.value).startswith(f"--dataset {name}: ") and "\n" not in str(error.value)
    assert f"`{name.partition('/')[0]}/" in DOCUMENT


def test_a_hub_id_as_timm_writes_it():
    assert find_dataset("hfds/timm/mini-imagenet") == find_dataset("timm/mini-imagenet")
    config = fill_defaults(TrainConfig(dataset="hfds/timm/mini-imagenet"))
    assert config.dataset == config.dataset_name == "timm/mini-imagenet"
    assert [without_prefix(name) for name in DATASETS] == list(DATASETS)
    assert without_prefix("torchvision/wds") == "torchvision/wds"  # a Hub id


def test_no_aug_overrides_the_other_augmentation():
    given = {"aa": "v0", "reprob": 0.5, "hflip": 1.0, "vflip": 0.5, "padding": 3, "train_interpolation": "random"}
    config = fill_defaults(parse_arguments(["--no-aug"]))
    assert config.no_aug
    config = fill_defaults(TrainConfig(no_aug=True, mixup=0.2, **given))
    off = {"aa": None, "reprob": 0.0, "hflip": 0.0, "vflip": 0.0, "padding": 0, "train_interpolation": None}
    assert {key: getattr(config, key) for key in off} == off and config.mixup == 0.2
    assert dataclasses.asdict(fill_defaults(config)) == dataclasses.asdict(config)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--scale", "1", "0.5"], "--scale 1.0 0.5: the smaller share comes first"),
        (["--scale", "0.5", "1", "--padding", "2"], "--scale is of timm's random crop, and --padding"),
        (["--aug-repeats", "0.5"], "--aug-repeats 0.5: each image comes at least once"),
        (["--aug-repeats", "2", "--streaming"], "--aug-repeats draws from the whole training split"),
        (["--lr-noise", "0.9", "0.4"], "--lr-noise 0.9 0.4: needs one share"),
        (["--lr-noise", "0.1", "0.2", "0.3"], "--lr-noise 0.1 0.2 0.3: needs one share"),
        (["--layer-decay", "0.7", "--sched", "none"], "take --sched constant"),
        (["--opt-kwargs", "amsgrad"], "--opt-kwargs 'amsgrad': needs KEY=VALUE"),
        (["--opt-kwargs", "eps=1"], "--opt-kwargs eps= has a flag of its own; use --opt-eps"),
        (["--opt-kwargs", "opt=sgd"], "--opt-kwargs opt= is decided already; use --opt"),
        (["--opt-kwargs", "params=1"], "--opt-kwargs params= is decided already; all that is trained"),
        (["--opt-kwargs", "model_or_params=1"], "--opt-kwargs model_or_params= is decided already"),
        (["--opt-kwargs", "weight_decay_exclude_1d=True"], "is decided already; --weight-decay is on all parameters"),
        (["--opt-kwargs", "filter_bias_and_bn=True"], "is decided already; --weight-decay is on all parameters"),
        (["--model-kwargs", "num_classes=3"], "--model-kwargs num_classes= is decided already; the data say how many"),
        (["--model-kwargs", "model_name=x"], "--model-kwargs model_name= is decided already; use --model"),
        (["--model-kwargs", "name=x"], "--model-kwargs name= is decided already; use --model"),
        (["--model-kwargs", "pretrained=True"], "is decided already; use --pretrained"),
        (["--model-kwargs", "checkpoint_path=x"], "is decided already; use --initial-checkpoint"),
        (["--model-kwargs", "weights=x"], "is decided already; use --pretrained-path"),
        (["--sched", "rsqrt"], "--sched rsqrt falls .* --warmup-epochs is 0; give it"),
        (["--gp", ""], "--gp '': names no pooling"),
        (["--gp", "max", "--model-kwargs", "global_pool=avg"], "--gp and --model-kwargs global_pool= are the same"),
        (["--drop", "0.1", "--model-kwargs", "drop_rate=0.2"], "--drop and --model-kwargs drop_rate= are the same"),
        (["--pretrained-path", "a", "--initial-checkpoint", "b"], "both say which weights to start from"),
        (["--hflip", "1.5"], "--hflip 1.5: a probability is at most 1"),
        (["--mixup-prob", "-1"], "--mixup-prob -1.0: must be a finite number of at least 0"),
        (["--decay-rate", "0"], "--decay-rate 0.0: must be a finite number above 0"),
        (["--opt-betas", "0.9", "1"], "--opt-betas .0.9, 1.0.: must be below 1"),
        (["--recount", "0"], "--recount 0: must be"),
        (["--opt-eps", "1e-3"], "--opt-eps: the optimizer 'momentum' has none"),
        (["--opt", "rmsproptf", "--opt-betas", "0.9", "0.99"], "--opt-betas: the optimizer 'rmsproptf' has none"),
        (["--clip-mode", "agc"], "--clip-mode agc clips nothing without --clip-grad"),
        (["--wandb-project", "p"], "--wandb-project is of a tracker that is off; add --log-wandb"),
        (["--wandb-tags", "a", "b"], "--wandb-tags is of a tracker that is off"),
        (
            ["--sched", "wsd", "--epochs", "3", "--decay-epochs", "9"],
            "--sched wsd cannot be made: wsd schedule requires",
        ),
    ],
)
def test_what_contradicts_is_refused(arguments, message):
    with pytest.raises(ApartError, match=message) as error:
        config = parse_arguments(arguments)
        check_names(config)
        fill_defaults(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag, value", [*REFUSED_VALUES, ("--sched", "linear")])
def test_a_value_that_is_not_taken(flag, value, capsys):
    for arguments in ([flag, value], [f"{flag}={value}"]):
        with pytest.raises(SystemExit) as stop:
            parse_arguments(arguments)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1
        reason = REFUSED_VALUES.get((flag, value))
        assert (f"{flag} {value!r} of timm is not taken: {reason}" if reason else f"invalid choice: '{value}'") in said
    assert value == "linear" or f"`{flag} {value or repr('')}`" in DOCUMENT
