"""What a run says goes through logging, so that a library's user decides whether to hear it."""

import logging

import pytest

from apart_hf.cli.train import main
from apart_hf.runs.train import train
from tests.support.settings import settings


def test_a_run_is_silent_unless_logging_is_set_up(little, tmp_path, capsys):
    train(settings(little, tmp_path, epochs=1, max_steps=1))
    said = capsys.readouterr()
    assert said.out == "" and "done:" not in said.err


def test_what_is_said_are_records_of_the_package(little, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="apart_hf"):
        train(settings(little, tmp_path, epochs=1, max_steps=1))
    assert any(record.message.startswith("done: top-1") for record in caplog.records)
    assert {record.name.split(".")[0] for record in caplog.records} >= {"apart_hf"}
    caplog.clear()
    with caplog.at_level(logging.ERROR, logger="apart_hf"):
        train(settings(little, tmp_path / "silent", epochs=1, max_steps=1))
    assert not [record for record in caplog.records if record.name.startswith("apart_hf")]


def test_a_command_says_it_and_leaves_logging_as_it_was(little, tmp_path, capsys):
    logger = logging.getLogger("apart_hf")
    before = logger.level, logger.propagate, list(logger.handlers)
    flags = "--model test_resnet --method standard --max-steps 1 --epochs 1 -b 8 --data-dir {} --output {}"
    main(flags.format(little, tmp_path).split())
    assert "done: top-1" in capsys.readouterr().out
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
    with pytest.raises(SystemExit):
        main(["--model", "nonsense"])
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_a_run_without_graphs_says_why_in_one_line(little, tmp_path, caplog):
    train(settings(little, tmp_path, epochs=1, max_steps=1, cuda_graph=True))
    (line,) = [record.message for record in caplog.records if "--cuda-graph" in record.message]
    assert line == "warning: --cuda-graph is left out: it trains on cpu, which has no such graphs."
