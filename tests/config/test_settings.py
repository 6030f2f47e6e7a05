"""Recipes, budgets and configuration files: what is resolved, and in which order."""

import re

import pytest
import yaml

from apart_hf import ApartError
from apart_hf.cli.train import main
from apart_hf.config.arguments import parse_arguments
from apart_hf.config.defaults import fill_defaults
from apart_hf.config.recipes import RECIPES
from apart_hf.config.train_config import TrainConfig
from tests.support.helpers import FAST, ROOT


def printed(capsys, *arguments):
    main([*arguments, "--print-config"])
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    "name, want",
    [
        (
            "cifar100-wrn40-apart",
            {
                "dataset": "cifar100",
                "model": "wide_resnet40_2",
                "method": "apart",
                "epsilon": 0.1,
                "groups": 16,
                "ratio": 1.0,
                "lr": 0.1,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "batch_size": 128,
                "epochs": 200,
                "decay_milestones": [100, 150],
                "mixup": 0.0,
            },
        ),
        ("cifar10-preact18-sam", {"model": "preact_resnet18", "rho": 0.05, "epsilon": None}),
        ("cifar100-preact18-sam", {"dataset": "cifar100", "rho": 0.1}),
        ("cifar100-wrn40-apart-sam", {"rho": 0.2, "groups": 16}),
        ("cifar100-wrn40-standard-mixup", {"method": "standard", "mixup": 1.0, "groups": None}),
        ("tiny-imagenet-preact18-apart-mixup", {"batch_size": 256, "groups": 8, "mixup": 0.2, "epochs": 200}),
        (
            "imagenet-resnet18-apart-sam",
            {
                "epsilon": 0.025,
                "groups": 1,
                "rho": 0.025,
                "weight_decay": 1e-4,
                "epochs": 105,
                "decay_milestones": [30, 60, 90, 100],
                "batch_size": 256,
            },
        ),
    ],
)
def test_recipes_are_the_paper_s(name, want, capsys):
    found = printed(capsys, "--recipe", name)
    assert {key: found[key] for key in want} == want


# the published hyper-parameters: (epsilon, groups, ratio, rho) and mixup's alpha, of each base and method
_APART, _BOTH = (0.1, 16, 1.0, None), (0.1, 16, 1.0, 0.2)
HYPER = {
    "cifar10": {
        "standard": ((None,) * 4, 1.0),
        "apart": (_APART, 0.2),
        "apart-sam": (_BOTH, 0.2),
        "sam": ((None, None, None, 0.05), None),
    },
    "cifar100": {
        "standard": ((None,) * 4, 1.0),
        "apart": (_APART, 0.2),
        "apart-sam": (_BOTH, 0.2),
        "sam": ((None, None, None, 0.1), None),
    },
    "tiny-imagenet": {
        "standard": ((None,) * 4, 0.2),
        "apart": ((0.1, 8, 1.0, None), 0.2),
        "apart-sam": ((0.1, 8, 1.0, 0.2), 0.2),
    },
    "imagenet": {
        "standard": ((None,) * 4, None),
        "apart": ((0.025, 1, 1.0, None), None),
        "apart-sam": ((0.025, 1, 1.0, 0.025), None),
    },
}
BASES = {
    "cifar10-wrn40": "wide_resnet40_2",
    "cifar10-preact18": "preact_resnet18",
    "cifar100-wrn40": "wide_resnet40_2",
    "cifar100-preact18": "preact_resnet18",
    "tiny-imagenet-preact18": "preact_resnet18",
    "imagenet-resnet18": "resnet18",
}


def test_every_recipe_has_the_published_hyper_parameters():
    found = {}
    for name, settings in RECIPES.items():
        config = TrainConfig(**settings)
        assert (config.lr, config.momentum, config.opt) == (0.1, 0.9, "momentum")
        cells = config.epsilon, config.groups, config.ratio, config.rho
        found[name] = (config.dataset, config.model, config.method, cells, config.mixup, config.batch_size)
    want = {}
    for base, model in BASES.items():
        dataset = base.rpartition("-")[0]
        size = 128 if dataset.startswith("cifar") else 256
        for method, (cells, alpha) in HYPER[dataset].items():
            want[f"{base}-{method}"] = (dataset, model, method, cells, 0.0, size)
            if alpha is not None:
                want[f"{base}-{method}-mixup"] = (dataset, model, method, cells, alpha, size)
    assert found == want


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_settled(name):
    config = fill_defaults(TrainConfig(**RECIPES[name]))
    assert config.epochs and config.decay_milestones[-1] < config.epochs
    assert (config.groups is not None) == ("apart" in config.method)


@pytest.mark.parametrize(
    "arguments, epochs, milestones",
    [
        (["--recipe", "cifar100-wrn40-apart", "--budget", "2"], 200, [100, 150]),
        (["--recipe", "cifar100-wrn40-apart", "--budget", "1"], 100, [50, 75]),
        (["--recipe", "cifar100-wrn40-standard", "--budget", "1"], 200, [100, 150]),
        (["--recipe", "cifar100-wrn40-standard", "--budget", "2"], 400, [200, 300]),
        (["--recipe", "cifar100-wrn40-sam", "--budget", "1"], 100, [50, 75]),
        (["--recipe", "cifar100-wrn40-apart", "--budget", "1.25", "--ratio", "0.25"], 200, [100, 150]),
        (["--recipe", "cifar100-wrn40-apart", "--budget", "1.5", "--every", "2"], 200, [100, 150]),
        (["--recipe", "imagenet-resnet18-apart", "--budget", "4"], 210, [60, 120, 180, 200]),
        (["--method", "sam", "--epochs", "10", "--budget", "4"], 20, [10, 15]),
        # 100 plain epochs, and the rest of 300, 400 or 250 passes over the data in epochs of 2, 2 or 1.5
        (["--recipe", "cifar100-wrn40-apart", "--budget", "1.5", "--perturb-from-epoch", "101"], 200, [100, 150]),
        (["--recipe", "cifar100-wrn40-apart", "--budget", "2", "--perturb-from-epoch", "101"], 250, [125, 188]),
        (
            ["--recipe", "cifar100-wrn40-apart", "--budget", "1.25", "--every", "2", "--perturb-from-epoch", "101"],
            200,
            [100, 150],
        ),
    ],
)
def test_a_budget_is_shared_over_the_passes(arguments, epochs, milestones, capsys):
    found = printed(capsys, *arguments)
    assert (found["epochs"], found["decay_milestones"], found["budget"]) == (epochs, milestones, None)


def test_flags_go_before_the_file_and_the_file_before_the_recipe(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: cifar100-wrn40-apart\nlr: 5e-2\nepochs: 30\nchannels_last: true\ndecay_milestones: [20]\n")
    found = printed(capsys, "--config", str(file), "--epochs", "40", "--no-channels-last")
    assert (found["lr"], found["epochs"], found["channels_last"]) == (0.05, 40, False)
    assert (found["decay_milestones"], found["groups"], found["dataset"]) == ([20], 16, "cifar100")


def test_a_run_s_config_repeats_it(tmp_path, capsys):
    main([*FAST, "--output", str(tmp_path), "--experiment", "a", "--seed", "5"])
    capsys.readouterr()
    main(["--config", str(tmp_path / "a/config.yaml"), "--experiment", "b"])
    one, two = (yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in "ab")
    assert one.pop("experiment") == "a" and two.pop("experiment") == "b" and one == two
    weights = [(tmp_path / name / "last/model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("named, folder", [(["--dataset", "cifar10"], "little"), ([], "cifar10")])
def test_a_run_on_a_folder_repeats_too(named, folder, tmp_path, capsys):
    """Also where the folder's name is that of a registered dataset, or its dataset was named."""
    folder = tmp_path / folder
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.parquet").write_bytes((ROOT / f"apart_hf/data/demo/{split}.parquet").read_bytes())
    main([*FAST, *named, "--data-dir", str(folder), "--output", str(tmp_path), "--experiment", "a"])
    main(["--config", str(tmp_path / "a/config.yaml"), "--experiment", "b"])
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a/last" / file).read_bytes() == (tmp_path / "b/last" / file).read_bytes()


def test_another_method_takes_its_own_hyper_parameters(tmp_path, capsys):
    assert printed(capsys, "--recipe", "cifar100-wrn40-sam", "--method", "apart-sam")["rho"] == 0.2
    file = tmp_path / "run.yaml"
    file.write_text("method: apart\nepsilon: 0.3\ngroups: 4\nrecipe: null\nexperiment: mine\n")
    found = printed(capsys, "--config", str(file), "--method", "sam")
    assert (found["epsilon"], found["groups"], found["rho"], found["experiment"]) == (None, None, 0.05, None)
    assert printed(capsys, "--config", str(file))["epsilon"] == 0.3
    with pytest.raises(ApartError, match="is of recipe None"):
        parse_arguments(["--config", str(file), "--recipe", "cifar100-wrn40-sam"])


@pytest.mark.parametrize(
    "flags, want",
    [
        (["--amp"], {"amp_dtype": "bfloat16"}),
        (["--lr-base", "0.8"], {"lr": None}),
        (["--input-size", "3", "32", "32"], {"img_size": 32}),
        (["--img-size", "40"], {"img_size": 40}),
    ],
)
def test_a_flag_unsets_what_the_file_says_of_the_same(flags, want, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("amp_dtype: float32\nlr: 0.1\nimg_size: 28\ninput_size: [3, 28, 28]\n")
    found = printed(capsys, "--config", str(file), *flags)
    assert {key: found[key] for key in want} == want


@pytest.mark.parametrize(
    "text, message",
    [
        ("epoch: 3", r"unknown key in .* 'epoch': did you mean 'epochs'"),
        ("epochs: many", r"epochs: 'many' is no int"),
        ("epochs: 2.5", r"epochs: 2.5 is no int"),
        ("channels_last: 3", r"channels_last: 3 is neither true nor false"),
        ("sched: linear", r"sched: 'linear' is none of multistep, cosine, step, constant, "),
        ("decay_milestones: 3", r"decay_milestones: 3 is no list"),
        ("lr: [0.1]", r"lr: \[0.1\] is a list"),
        ("epochs: 0", r"--epochs 0: must be"),
        ("- epochs", r"must hold lines `key: value`, not a list"),
        ("a: [", r"no YAML"),
        ("model: !!python/object/apply:os.system ['true']", r"no YAML"),
    ],
)
def test_a_bad_file_ends_in_one_line(text, message, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(tmp_path / "bad.yaml"), "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert re.search(message, error), error


def test_files_and_recipes_that_are_not_there():
    with pytest.raises(ApartError, match="cannot be read"):
        parse_arguments(["--config", "/nowhere.yaml"])
    with pytest.raises(ApartError, match="unknown recipe 'cifar100-wrn40-apert': did you mean"):
        parse_arguments(["--recipe", "cifar100-wrn40-apert"])


def test_print_config_touches_no_data(capsys):
    main(["--data-dir", "/nowhere", "--print-config"])
    assert yaml.safe_load(capsys.readouterr().out)["data_dir"] == "/nowhere"


@pytest.mark.parametrize("method, epsilon", [("apart", 0.05), ("random-bn", 0.05), ("advbn", 1.1), ("sam", None)])
def test_a_datasets_epsilon_is_that_of_batchnorm_statistics(method, epsilon):
    assert fill_defaults(TrainConfig(dataset="demo", method=method)).epsilon == epsilon
