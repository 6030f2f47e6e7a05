"""Rho that follows the learning rate, as GSAM's does."""

import json
import math

import pytest

from apart_hf import ApartError
from apart_hf.cli.train import main
from apart_hf.runs.train import train
from apart_hf.strategies.two_pass import TwoPassStrategy
from tests.support.settings import settings


def test_rho_falls_with_the_learning_rate(little, tmp_path, monkeypatch):
    seen, two_passes = [], TwoPassStrategy.two_passes

    def noted(strategy, *arguments):
        seen.append((strategy.perturbations[0].rho, strategy.combination.alpha))
        return two_passes(strategy, *arguments)

    monkeypatch.setattr(TwoPassStrategy, "two_passes", noted)
    more = {"method": "gsam", "rho": 0.05, "rho_min": 0.02, "alpha": 0.3, "sched": "cosine", "lr": 0.5, "min_lr": 0.1}
    run = train(settings(little, tmp_path, **more, epochs=2, checkpoint_every=None))
    cosine = [0.5 * (1 + math.cos(math.pi * step / 18)) for step in range(18)]
    assert seen == [(pytest.approx(0.02 + 0.03 * share), 0.3) for share in cosine] and seen[0][0] == 0.05
    record = json.loads((run / "last/config.json").read_text())["apart"]
    assert record["rho"] == 0.05 and record["alpha"] == 0.3 and record["settings"]["rho_min"] == 0.02


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--method gsam --rho-min 0.1", "--rho-min 0.1 is above --rho 0.04, from which"),
        ("--method apart --rho-min 0.1", "--rho-min: the method 'apart' has no rho; leave the flag out"),
        ("--method sam --rho-min -1", "rho-min -1.0: must be a finite number of at least 0"),
        ("--method sam --rho-min 0 --sched none", "--rho-min lets rho follow the learning rate, and --sched none"),
        ("--method sam --alpha 0.1", "method 'sam' has no hyper-parameter 'alpha'; it has rho, global_norm"),
        ("--method gsam --gamma 0.1", "method 'gsam' has no hyper-parameter 'gamma'; it has rho, alpha"),
        ("--method sam --layer layer1", "method 'sam' has no hyper-parameter 'layer'"),
        ("--method advbn --steps 0", "steps"),
    ],
)
def test_flags_that_do_not_fit(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments.split(), "--print-config"])
    assert stop.value.code == 2
    assert said in (error := capsys.readouterr().err) and "Traceback" not in error


@pytest.mark.parametrize(
    "more, said",
    [
        ({"method": "advbn", "layer": "layre1"}, "unknown layer 'layre1': did you mean 'layer1'"),
        ({"method": "advbn", "step_size": -1.0}, "step_size=-1.0: the size of a step must be a finite number >= 0"),
        ({"method": "awp", "gamma": -0.1}, "gamma=-0.1: the radius must be a finite number >= 0"),
        ({"method": "gsam", "alpha": -0.1}, "alpha=-0.1: the share of the orthogonal part must be"),
    ],
)
def test_values_that_a_method_refuses_before_anything_is_written(more, said, little, tmp_path):
    with pytest.raises(ApartError, match=said):
        train(settings(little, tmp_path, **more))
    assert not list(tmp_path.iterdir())
