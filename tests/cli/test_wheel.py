"""What is installed works without the repository."""

import subprocess
import sys

import pytest

from tests.support.helpers import FAST, ROOT, run

COMMAND = """
import runpy, sys
sys.argv = [sys.argv[1], "pull", "demo-test_resnet-apart", "model"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    assert not ended.code
import apart_hf
print(apart_hf.__file__, [apart_hf.load_pretrained(name)[0].num_classes for name in apart_hf.list_pretrained()])
"""


@pytest.mark.process
def test_the_wheel_works_elsewhere(tmp_path):
    """Built from the tracked files, unpacked into a folder of its own: its command trains on the data inside it."""
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
    site = {"PYTHONPATH": str(tmp_path / "site"), "ACCELERATE_USE_CPU": "true"}
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "apart_hf", "train")
    trained = run(*launch, *FAST, "--output", tmp_path / "out", cwd=tmp_path, **site)
    assert trained.returncode == 0, trained.stderr
    assert list((tmp_path / "out").glob("*/last/model.safetensors"))
    used = run(sys.executable, "-c", COMMAND, tmp_path / "site/bin/apart-hf", cwd=tmp_path, **site)
    assert used.returncode == 0, used.stderr
    last = used.stdout.splitlines()[-1]
    assert last.startswith(str(tmp_path / "site")) and "[10, 10]" in last, last
    assert (tmp_path / "model/model.safetensors").exists()
