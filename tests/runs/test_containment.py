"""A run writes into its own folder alone, and no token into it."""

from pathlib import Path

import pytest

from apart_hf.cli.train import main
from tests.support.helpers import FAST, REPO, write_demo

ONE = [*FAST[:-1], "1", "--epochs", "1", "--threads", "1"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a dataset beside it."""
    write_demo(tmp_path / "x", train=32, test=20)
    (tmp_path / "a/work").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/work")
    return tmp_path


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--experiment", name] for name in ("..", ".", "../x", "/nowhere/x", "a/b", "a/", "~/x", "a\0b", "x" * 300)),
        *(["--experiment", name, "--resume", "auto"] for name in ("..", "../..", "../../x")),
        ["--model", "a/../../b"],
        ["--model", "../x"],
        ["--model", "local-dir:../../x"],
        ["--model", "hf_hub:../../x"],
        ["--dataset", "../../nothing"],
        ["--dataset", ".."],
        ["--output", "a\0b"],
        ["--data-dir", "a\0b"],
    ],
)
def test_names_that_lead_out_are_refused(arguments, here, capsys):
    before = files(here)
    data = [] if "--dataset" in arguments else ["--data-dir", str(here / "x")]
    with pytest.raises(SystemExit) as stop:
        main([*ONE, "--output", "out", *data, *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    assert files(here) - before <= {Path("a/work/out")}


@pytest.mark.parametrize(
    "arguments, name",
    [
        (["--dataset", "../../x", "--data-dir", "../../x"], "x-test_resnet-apart"),
        (["--dataset", "../../x"], ".._.._x-test_resnet-apart"),
        (["--data-dir", "../../a/../x/."], "x-test_resnet-apart"),
        (["--data-dir", "../../x", "--experiment", "..."], "..."),
    ],
)
def test_all_that_is_written_is_in_the_run_s_folder(arguments, name, here, capsys):
    before = files(here)
    main([*ONE, "--output", "out", *arguments])
    new = files(here) - before
    run = Path("a/work/out") / name
    assert {run / "last/model.safetensors", run / "config.yaml", run / "plots/training.png"} <= new
    assert all(run in (path, *path.parents) for path in new - {run.parent})


def test_no_token_is_written_or_said(hub, quickly, here, capsys):
    flags = f"--data-dir ../../x --output out --experiment run --report-to tensorboard --push-to-hub {REPO}"
    main([*ONE, *flags.split(), "--license", "mit"])
    written = [path for path in here.rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"README.md", "config.yaml", "metrics.jsonl", "config.json", "run.pt", "manifest.json"} <= names
    assert not [path for path in written if b"hf_write" in path.read_bytes()]
    assert not [name for name, content in hub.files(REPO).items() if b"hf_write" in content]
    said = capsys.readouterr()
    assert "pushed: " in said.out and "hf_write" not in said.out + said.err


def test_a_refused_token_is_not_said(hub, here, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with pytest.raises(SystemExit) as stop:
        main([*ONE, "--data-dir", "../../x", "--output", "out", "--push-to-hub", REPO])
    said = capsys.readouterr()
    assert stop.value.code == 2 and "does not take the token" in said.err and "hf_nobody" not in said.out + said.err
    assert not Path("out").exists()
