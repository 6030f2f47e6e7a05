"""The package and the help of the training command start as fast as torch and timm do: they import nothing else."""

import json
import sys

import pytest

from tests.support.helpers import ROOT, run

PROGRAM = """
import json, runpy, sys, torch, timm

def third_party():
    found = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
    return {name for name in found if getattr(sys.modules.get(name), "__file__", None)}  # no namespaces of test tools

usual = third_party()
import apart_hf
package = third_party() - usual
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    assert not ended.code
print(json.dumps([sorted(package), sorted(third_party() - usual)]))
"""


@pytest.mark.process
def test_nothing_heavy_is_imported_before_it_is_needed():
    ended = run(sys.executable, "-c", PROGRAM, ROOT / "scripts/train.py")
    assert ended.returncode == 0, ended.stderr
    package, command = json.loads(ended.stdout.splitlines()[-1])
    assert package == ["apart_hf"] and command == ["apart_hf"]
    assert ended.stdout.startswith("usage: train.py ")
