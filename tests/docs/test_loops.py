"""The pages on other people's loops are true: their code runs, and their diff fits."""

import re

import pytest

from tests.support.helpers import ROOT

LOOPS, TIMM = ((ROOT / "docs" / name).read_text() for name in ("LOOPS.md", "TIMM.md"))


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", LOOPS, re.S), ids=["a strategy", "a loss"])
def test_the_loop_runs(code):
    scope = {}
    exec(code, scope)
    assert scope["loss"].isfinite()


def test_the_line_of_the_diff_runs():
    added = [line[1:].strip() for line in TIMM.splitlines() if re.match(r"\+(?!\+\+)", line)]
    assert len(added) == 2
    import timm
    from timm.task import ClassificationTask

    scope = {"task": ClassificationTask(timm.create_model("test_resnet"), verbose=False)}
    exec("\n".join(added), scope)
    assert str(scope["task"].forward.loss.strategy) == "apart(epsilon=0.1, groups=16, ratio=1.0)"
