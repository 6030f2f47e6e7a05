"""Where there is no POSIX system: training says so in one line, and what needs none works."""

import sys

import pytest

from tests.support.helpers import run

# what Windows lacks; libraries that adapt to it have been imported before
WINDOWS = """
import os, platform, signal, sys, torch, timm
sys.modules["fcntl"] = None
for module, names in ((os, ("setpgrp", "killpg", "fork", "sched_getaffinity")), (signal, ("SIGUSR1", "SIGKILL"))):
    for name in names:
        delattr(module, name)
platform.system = lambda: "Windows"
"""
WORKS = """
import apart_hf
model, transform = apart_hf.load_pretrained("demo-test_resnet-apart")
strategy = apart_hf.create_strategy("apart", model.train(), groups=2)
images, targets = torch.randn(8, *model.pretrained_cfg["input_size"]), torch.arange(8)
loss, output = strategy.accumulate_gradients(images, targets, torch.nn.functional.cross_entropy)
assert loss.isfinite() and all(p.grad is not None for p in model.parameters())
"""
REFUSED = """
from apart_hf.__main__ import main
main(["train", "--print-config"])
for command in (["train", "--model", "test_resnet"], ["reproduce", "table1"]):
    try:
        main(command)
    except SystemExit as ended:
        print("exit code", ended.code)
try:
    import apart_hf.runs.run
except apart_hf.ApartError as error:
    print(error)
"""


@pytest.mark.process
def test_training_is_refused_and_the_library_works(tmp_path):
    ended = run(sys.executable, "-c", WINDOWS + WORKS + REFUSED, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    *settings, first, second, line = ended.stdout.splitlines()
    assert "method: apart" in settings and first == second == "exit code 2"
    assert ended.stderr.splitlines() == [f"apart-hf {command}: error: {line}" for command in ("train", "reproduce")]
    assert line == (
        "training needs a POSIX system (Linux, macOS, WSL), which Windows is not; create_strategy in a loop of your "
        "own and load_pretrained need none."
    )
    assert not list(tmp_path.iterdir())
