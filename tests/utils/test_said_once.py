"""What several processes of a run have to say is said once, by whichever of them meets it."""

import os
import tempfile
import time
from types import SimpleNamespace

import pytest

from apart_hf.cli.train import main
from apart_hf.errors import ApartError, OneProcessError
from apart_hf.utils import said_once
from apart_hf.utils.command_line import run_command
from apart_hf.utils.said_once import is_first_to_say
from tests.support.processes import command, fork_ranks


@pytest.fixture
def process(tmp_path, monkeypatch):
    """Makes this process that of a number, in a run of three which begins now."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(said_once, "PATIENCE", 0.2)
    monkeypatch.setenv("MASTER_PORT", "29511")
    monkeypatch.setenv("WORLD_SIZE", "3")
    began = time.time() - 1  # times of files are some milliseconds behind
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(create_time=lambda: began))

    def become(number):
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setattr(os, "getpid", lambda: 1000 + number)

    return become


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_one_of_three_says_it(order, process):
    said = []
    for number in order:
        process(number)
        said += [number] if is_first_to_say("no such folder") else []
    assert said == [order[0]]


def test_the_first_process_goes_first(process, monkeypatch):
    """Another one waits for it."""
    process(1)
    mark = said_once._mark("no such folder")
    monkeypatch.setattr(time, "sleep", lambda seconds: mark.write_text("1000"))
    assert not is_first_to_say("no such folder")


def test_other_words_and_other_runs_are_said_again(process, monkeypatch):
    process(1)
    assert is_first_to_say("no such folder")
    process(2)
    assert is_first_to_say("no such file") and not is_first_to_say("no such folder")
    monkeypatch.setenv("MASTER_PORT", "29512")
    assert is_first_to_say("no such folder")


def test_the_mark_of_an_earlier_run_silences_nobody(process, tmp_path):
    process(0)
    mark, old = said_once._mark("no such folder"), tmp_path / "tmp/apart_hf-said-old"
    for file, seconds in ((mark, 5), (old, 5000)):
        file.write_text("77")
        os.utime(file, (time.time() - seconds,) * 2)
    assert is_first_to_say("no such folder") and mark.read_text() == "1000"
    process(2)
    assert not is_first_to_say("no such folder")
    assert is_first_to_say("no such file")
    assert not old.exists() and mark.exists()


def test_where_no_mark_can_be_left_it_is_said(process, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    process(1)
    assert is_first_to_say("no such folder")


@pytest.mark.parametrize("kind, lines", [(ApartError, 1), (OneProcessError, 3)])
def test_an_error_of_all_and_one_of_each(kind, lines, process, capsys):
    def fail(prog):
        raise kind("no such folder; make it.")

    for number in (1, 0, 2):
        process(number)
        with pytest.raises(SystemExit) as raised:
            run_command(fail)
        assert raised.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines and said[0].endswith("error: process 1: no such folder; make it.")


def test_a_misspelt_flag_is_said_once(process, capsys):
    for number in range(3):
        process(number)
        with pytest.raises(SystemExit) as raised:
            main(["--learning-rate", "1"])
        assert raised.value.code == 2
    assert capsys.readouterr().err.count("unrecognized arguments") == 1


def second_has_no_data(arguments):
    main([*arguments, "--data-dir", "/none"] if os.environ["RANK"] == "1" else arguments)


@pytest.mark.process
def test_an_error_of_the_second_process_alone_is_seen(little, tmp_path):
    """The first one waits for it, and says in other words that it is gone."""
    first, second = fork_ranks(command(little, tmp_path, "-b", "4"), main=second_has_no_data)
    _, error = second.communicate(60)
    assert second.returncode == 2 and error.count("\n") == 1 and "process 1: " in error and "/none" in error
    _, error = first.communicate(60)
    assert first.returncode == 75 and "/none" not in error and "look for its own message" in error
