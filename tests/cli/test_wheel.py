"""What is installed works without the repository."""

import subprocess
import sys

import pytest

from tests.support.helpers import FAST, ROOT, run


@pytest.mark.process
def test_the_wheel_works_elsewhere(tmp_path):
    """Built from the tracked files, unpacked into a folder of its own: trains on the data inside it."""
    source = tmp_path / "source"
    source.mkdir()
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    built = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source)
    assert built.returncode == 0, built.stderr
    wheel = next(tmp_path.glob("apart_hf-*.whl"))
    installed = run(*pip, "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    assert installed.returncode == 0, installed.stderr
    assert (tmp_path / "site/apart_hf/data/demo/LICENSE").exists()
    code = """
import runpy, sys
runpy.run_module("apart_hf", run_name="__main__", alter_sys=True)  # python -m apart_hf ...
import apart_hf
print(apart_hf.__file__, [apart_hf.load_pretrained(name)[0].num_classes for name in apart_hf.list_pretrained()])
"""
    command = [sys.executable, "-c", code, "train", *FAST, "--output", tmp_path / "out"]
    result = run(*command, PYTHONPATH=str(tmp_path / "site"))
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith(str(tmp_path / "site")) and "[10, 10]" in last, last
    assert list((tmp_path / "out").glob("*/last/model.safetensors"))
