"""Scripts that measure, at a size that takes seconds."""

import sys

import pytest

from tests.helpers import ROOT, run


@pytest.mark.parametrize("flags, loaders", [
    (("--images", "256"), ["memory", "workers"]), (("--size", "224", "--images", "128"), ["workers"]),
])
def test_loader_speed(flags, loaders):
    done = run(sys.executable, ROOT / "scripts/loader_speed.py", *flags, "--repeats", "1")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[1].strip() for row in rows] == loaders
    assert all(float(row[2].split(" - ")[1].replace(",", "")) > 0 for row in rows)
