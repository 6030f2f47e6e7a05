"""The package, the help of commands and what is listed start as fast as torch and timm do: they import nothing else."""

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
from apart_hf.__main__ import main
for arguments in (["--help"], ["list"], ["list", "--help"], ["pull", "--help"]):
    try:
        main(arguments)
    except SystemExit as ended:
        assert not ended.code
command = third_party() - usual
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    assert not ended.code
print(json.dumps([sorted(package), sorted(command), sorted(third_party() - usual)]))
"""


@pytest.mark.process
def test_nothing_heavy_is_imported_before_it_is_needed():
    ended = run(sys.executable, "-c", PROGRAM, ROOT / "scripts/train.py")
    assert ended.returncode == 0, ended.stderr
    package, console, script = json.loads(ended.stdout.splitlines()[-1])
    assert package == console == script == ["apart_hf"]
    assert ended.stdout.startswith("usage: apart-hf ") and "\nusage: train.py " in ended.stdout
