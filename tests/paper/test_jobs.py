"""Rows of tables become the right runs, and a name stands for one training."""

import json

import pytest

from apart_hf.paper.jobs import is_published
from apart_hf.paper.tables import ROWS, TABLES
from tests.support.jobs import run_of


@pytest.mark.parametrize(
    "table, flags, row, cost, want",
    [
        ("table1", (), "standard", 1, {"epochs": 200, "decay_milestones": [100, 150], "mixup": 0}),
        ("table1", (), "standard-2x", 2, {"epochs": 400, "decay_milestones": [200, 300]}),
        ("table1", (), "apart", 2, {"epochs": 200, "epsilon": 0.1, "groups": 16, "ratio": 1.0, "batch_size": 128}),
        ("table1", ("--dataset", "cifar10"), "sam", 2, {"epochs": 200, "rho": 0.05, "dataset": "cifar10"}),
        ("table1", ("--model", "preact_resnet18"), "apart-sam-mixup", 2, {"rho": 0.2, "model": "preact_resnet18"}),
        ("table1", (), "standard-mixup-2x", 2, {"mixup": 1.0, "epochs": 400}),
        ("table2", (), "apart", 2, {"groups": 8, "batch_size": 256, "dataset": "tiny-imagenet"}),
        ("table2", ("--dataset", "imagenet"), "apart-4x", 4, {"epochs": 210, "decay_milestones": [60, 120, 180, 200]}),
        ("table2", ("--dataset", "imagenet"), "standard-4x", 4, {"epochs": 420, "model": "resnet18"}),
        ("table3", (), "standard-1.2x", 1.2, {"epochs": 240, "decay_milestones": [120, 180]}),
        ("table3", (), "apart-N24-n2", 1.1875, {"epochs": 200, "ratio": 24 / 128, "groups": 2}),
        ("table3", (), "apart-eps0.4-n8", 2, {"epsilon": 0.4, "groups": 8}),
        ("study", (), "apart-every2", 1.5, {"every": 2, "groups": 16, "epochs": 200}),
        ("study", (), "apart-ratio0.25", 1.25, {"ratio": 0.25}),
        ("study", (), "apart-last-half", 1.5, {"perturb_from_epoch": 101, "epochs": 200, "groups": 16, "every": 1}),
        ("study", ("--scale", "long"), "apart-last-half", 1.5, {"perturb_from_epoch": 51, "epochs": 100}),
        ("study", ("--scale", "medium"), "apart-last-half", 1.5, {"perturb_from_epoch": 31, "epochs": 60}),
        ("study", ("--scale", "small"), "apart-last-half", 1.5, {"perturb_from_epoch": 25, "groups": 8}),
        (
            "study",
            ("--scale", "long", "--", "--epochs", "20", "--decay-milestones", "10"),
            "apart-last-half",
            1.5,
            {"perturb_from_epoch": 11, "epochs": 20},
        ),
        ("study", (), "ghost-bn", 2, {"method": "ghost-bn", "epochs": 200, "weight_decay": 5e-4}),
        (
            "study",
            ("--scale", "medium"),
            "standard-2x",
            2,
            {"epochs": 120, "decay_milestones": [60, 90], "model": "wide_resnet16_2", "padding": 2, "lr": 0.1},
        ),
        ("study", ("--scale", "medium"), "ghost-bn", 2, {"groups": 16, "batch_size": 128, "amp_dtype": "bfloat16"}),
        ("study", ("--scale", "small"), "sam", 2, {"groups": None, "rho": 0.1, "batch_size": 64, "epochs": 48}),
        ("study", ("--scale", "small"), "ghost-bn", 2, {"groups": 8, "amp_dtype": "float32"}),
        (
            "study",
            ("--scale", "long"),
            "standard",
            1,
            {
                "epochs": 100,
                "decay_milestones": [50, 75],
                "batch_size": 128,
                "lr": 0.1,
                "amp_dtype": "float32",
                "padding": 2,
            },
        ),
        ("study", ("--scale", "long"), "standard-2x", 2, {"epochs": 200, "val_interval": 200}),
        ("study", ("--scale", "long"), "random-bn-n1", 2, {"method": "random-bn", "groups": 1, "epsilon": 0.1}),
        ("study", ("--scale", "long"), "apart-sam-n1", 2, {"groups": 1, "epsilon": 0.1, "rho": 0.2, "epochs": 100}),
        ("table1", ("--scale", "small"), "apart-sam-mixup", 2, {"groups": 8, "epsilon": 0.1}),
        ("study", ("--scale", "small"), "apart-n1", 2, {"groups": 1}),
    ],
)
def test_rows_are_the_papers_settings(table, flags, row, cost, want):
    made = run_of(table, row, *flags, seed=3)
    assert made.cost == pytest.approx(cost) and made.config.seed == 3
    assert {key: getattr(made.config, key) for key in want} == want


def test_every_row_of_every_table_makes_a_run():
    made = 0
    for name, table in TABLES.items():
        for (dataset, model), rows in table.parts.items():
            for row in rows:
                found = run_of(name, row, "--dataset", dataset, "--model", model)
                assert found.config.dataset == dataset and found.config.model == model
                made += 1
    assert made == 4 * 9 + 8 + 6 + 14 + 20 and set(ROWS) == {
        row for table in TABLES.values() for rows in table.parts.values() for row in rows
    }


def test_one_name_is_one_training():
    """The rows that tables share are trained once."""
    assert run_of("table1", "apart") == run_of("table3", "apart")
    assert run_of("table1", "apart") != run_of("table1", "apart", "--", "--channels-last")


def test_a_part_of_another_folder_is_another_part():
    places = [
        run_of("study", "standard", "--scale", "small", *where).places["data_dir"]
        for where in ((), ("--data-dir", "/a/data"), ("--data-dir", "/b/data"))
    ]
    assert len(set(places)) == 3


def test_the_published_value_stands_beside_its_own_setting_only():
    run = run_of("table1", "standard", "--", "--channels-last", "--amp-dtype", "bfloat16")
    result = {"settings": json.loads(json.dumps(run.settings)), "processes": 1, "whole": True, "images": 50_000}
    assert is_published(run, result)
    for other in ({"processes": 4}, {"whole": False}, {"images": 5000}):
        assert not is_published(run, result | other)
    short = run_of("table1", "standard", "--", "--epochs", "10", "--decay-milestones", "5")
    assert not is_published(short, result | {"settings": short.settings})


def test_a_result_knows_of_no_setting_that_had_no_part_in_it():
    plain = run_of("table1", "standard", "--", "--lr-base-size", "512").settings
    scaled = run_of("table1", "standard", "--", "--lr-base", "0.1", "--lr-base-size", "512").settings
    assert scaled.keys() - plain.keys() == {"lr_base_size", "lr_base_scale"}
    assert scaled["lr_base_size"] == 512 and "clip_grad" in plain and plain["clip_grad"] is None
    assert "output" not in plain and "threads" not in plain


def test_the_folder_that_is_named_is_read_at_any_scale():
    """Also at that of the bundled data, which are in a format that needs a package more."""
    assert "data_dir" not in run_of("table1", "apart", "--scale", "smoke").places
    for scale in ("smoke", "full"):
        run = run_of("table1", "apart", "--scale", scale, "--data-dir", "/a/data")
        assert run.places["data_dir"] == "/a/data" == run.config.data_dir
