"""Bars are shown where somebody watches, and nowhere else."""

import io
import sys
import types

import pytest

from apart_hf.utils.progress_bar import is_watched, progress_bar


class Stderr(io.StringIO):
    """Standard error that is a terminal, or not."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize("terminal, notebook", [(True, False), (False, True), (True, True), (False, False)])
def test_on_a_terminal_and_in_a_notebook(terminal, notebook, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stderr(terminal))
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", types.ModuleType("ipykernel.zmqshell"))
    assert is_watched() == (terminal or notebook)
    assert list(progress_bar(range(3), "counting", unit="sheep")) == [0, 1, 2]
    said = sys.stderr.getvalue()
    assert ("counting" in said and "0/3" in said) if terminal or notebook else said == ""


def test_without_a_title_there_is_none(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stderr(True))
    assert list(progress_bar(range(3), None)) == [0, 1, 2] and sys.stderr.getvalue() == ""


def test_the_bar_of_a_notebook_is_the_notebook_s_own():
    from accelerate.utils import tqdm as of_accelerate
    from tqdm.auto import tqdm

    with_bar = of_accelerate(range(1), disable=True)
    assert isinstance(with_bar, tqdm)  # which is tqdm.notebook's there
