"""The scripts start and say what they take; those that measure run at a size that takes seconds."""

import runpy
import sys

import pytest

from tests.support.helpers import ROOT


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {script.name} ")


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("analyse.py", ["robustness", "--checkpoint", "none"], "unknown pretrained model 'none'"),
        ("train.py", ["--model", "resnet_18"], "unknown model"),
    ],
)
def test_the_script_itself_exits_with_2(script, arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"{script}: error: {message}")


@pytest.mark.parametrize(
    "flags, loaders",
    [(("--images", "256"), ["memory", "workers"]), (("--size", "224", "--images", "128"), ["workers"])],
)
def test_loader_speed(flags, loaders, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["loader_speed.py", *flags, "--repeats", "1"])
    runpy.run_path(str(ROOT / "scripts/loader_speed.py"), run_name="__main__")
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[1].strip() for row in rows] == loaders
    assert all(float(row[2].split(" - ")[1].replace(",", "")) > 0 for row in rows)
