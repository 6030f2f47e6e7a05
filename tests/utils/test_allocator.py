"""What is freed stays with the process, where its allocator is glibc's and the user has not set it up."""

import ctypes
import json
import os
import runpy
import shutil
import subprocess
import sys

import pytest

from apart_hf.cli.train import main
from apart_hf.runs import train as runs_train
from apart_hf.runs.train import train
from apart_hf.utils import allocator
from apart_hf.utils.allocator import is_set_up, keep_freed_memory
from tests.support.helpers import ROOT, run
from tests.support.processes import assert_equal_runs
from tests.support.settings import settings

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted on Linux")
# the module alone, without torch
ALONE = f"import runpy; print(runpy.run_path({str(ROOT / 'apart_hf/utils/allocator.py')!r})['keep_freed_memory']())"


@LINUX
@pytest.mark.process
def test_a_step_takes_again_what_the_one_before_freed():
    """An interpreter of its own, as a run has it: a fork would have the heap that earlier tests have left."""
    ended = run(sys.executable, ROOT / "tests/support/page_faults.py", ROOT / "apart_hf/utils/allocator.py")
    assert ended.returncode == 0, ended.stderr
    before, is_set, after = json.loads(ended.stdout)
    if not is_set:  # no glibc here
        assert after > before / 2
    else:
        assert before > 128 * 2**20 / 4096 / 2 and after < before / 10, (before, after)  # pages of 4 KiB


@pytest.mark.parametrize(
    "environment, wins",
    [
        ({}, False),
        ({"MALLOC_TRIM_THRESHOLD_": "1"}, True),
        ({"MALLOC_MMAP_THRESHOLD_": "131072"}, True),
        ({"MALLOC_TOP_PAD_": "0"}, True),
        ({"MALLOC_ARENA_MAX": "2"}, True),
        ({"MALLOC_CONF": "narenas:1"}, True),  # jemalloc's
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}, True),
        ({"GLIBC_TUNABLES": "glibc.cpu.x86_rep_movsb_threshold=4096:glibc.malloc.hugetlb=1"}, True),
        ({"GLIBC_TUNABLES": "glibc.cpu.x86_rep_movsb_threshold=4096"}, False),  # says nothing of memory
        ({"LC_MALLOC_": "1", "PYTHONMALLOC": "malloc"}, False),
    ],
)
def test_variables_of_the_user_win(environment, wins, monkeypatch):
    assert is_set_up(environment) == wins
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(allocator, "_raise_thresholds", lambda process: True)
    assert keep_freed_memory.__wrapped__() == (LINUX_WITH_GLIBC and not wins)


def _has_glibc():
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError, OSError):
        return False


LINUX_WITH_GLIBC = sys.platform.startswith("linux") and _has_glibc()


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
def test_nothing_happens_on_other_systems(platform, monkeypatch, capfd):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", None)  # it is not even looked for
    assert keep_freed_memory.__wrapped__() is False and capfd.readouterr() == ("", "")


class Library:
    """A C library with these functions, which are of `libraries`, by name."""

    def __init__(self, libraries, accepted=(2**30,)):
        self.libraries, self.accepted, self.calls = libraries, accepted, []

    def __getattr__(self, name):
        if name not in self.libraries:
            raise AttributeError(f"undefined symbol: {name}")
        return name

    def mallopt(self, parameter, value):
        self.calls.append((parameter, value))
        return int(parameter != -3 or value in self.accepted)


@pytest.mark.parametrize(
    "libraries, is_set",
    [
        ({"malloc": 1, "gnu_get_libc_version": 1, "dladdr": 1}, True),
        ({"malloc": 2, "gnu_get_libc_version": 1, "dladdr": 1}, False),  # jemalloc before it
        ({"malloc": 1, "dladdr": 1}, False),  # musl
        ({"malloc": 1, "gnu_get_libc_version": 1}, False),  # a static program
    ],
)
def test_only_glibc_s_own_malloc_is_told(libraries, is_set, monkeypatch, capfd):
    library = Library(libraries)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)

    def found(process, function):
        getattr(process, "dladdr")  # noqa: B009
        return process.libraries[getattr(process, function)]

    monkeypatch.setattr(allocator, "_library", found)
    assert keep_freed_memory.__wrapped__() is is_set and capfd.readouterr() == ("", "")
    assert library.calls == ([(-3, 2**30), (-1, 2**31 - 1), (-2, 2**26)] if is_set else [])


def test_an_older_version_takes_its_own_largest_threshold():
    """One that takes neither is left as it is: the others would keep its threshold from growing."""
    bound = 2**22 * ctypes.sizeof(ctypes.c_long)
    older, none = Library({}, accepted=(bound,)), Library({}, accepted=())
    assert allocator._raise_thresholds(older) and older.calls[1:] == [(-3, bound), (-1, 2**31 - 1), (-2, 2**26)]
    assert not allocator._raise_thresholds(none) and [parameter for parameter, _ in none.calls] == [-3, -3]


@pytest.mark.process
@pytest.mark.skipif(not LINUX_WITH_GLIBC or shutil.which("cc") is None, reason="needs glibc and a C compiler")
def test_a_preloaded_allocator_stays_as_it_is(tmp_path):
    (tmp_path / "other.c").write_text("""
        #include <stddef.h>
        extern void *__libc_malloc(size_t);
        void *malloc(size_t size) { return __libc_malloc(size); }
    """)
    library = tmp_path / "libother.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "other.c"], check=True)
    for preload, want in (("", "True\n"), (str(library), "False\n")):
        ended = run(sys.executable, "-c", ALONE, LD_PRELOAD=preload)
        assert (ended.stdout, ended.stderr) == (want, "")


def test_a_run_sets_it_unless_it_is_told_not_to(little, tmp_path, monkeypatch):
    """And computes the same: bit for bit."""
    calls = []
    monkeypatch.setattr(runs_train, "keep_freed_memory", lambda: calls.append(keep_freed_memory()))
    plain = train(settings(little, tmp_path / "plain", epochs=1, no_mallopt=True, checkpoint_every=None))
    assert calls == []
    kept = train(settings(little, tmp_path / "kept", epochs=1, checkpoint_every=None))
    assert len(calls) == 1
    assert_equal_runs(plain, kept)
    main(["--config", str(kept / "config.yaml"), "--resume", str(kept), "--no-mallopt"])  # free on resume
    assert len(calls) == 1


@pytest.mark.parametrize("command", ["validate", "analyse robustness"])
@pytest.mark.parametrize("flags", [(), ("--no-mallopt",)])
def test_commands_that_measure_do_likewise(command, flags, monkeypatch):
    name, *rest = command.split()
    module, calls = __import__(f"apart_hf.cli.{name}", fromlist=["main"]), []
    monkeypatch.setattr(module, "keep_freed_memory", lambda: calls.append(1))
    with pytest.raises(SystemExit):
        module.main([*rest, "--checkpoint", "none", *flags])
    assert len(calls) == (not flags)


def test_the_module_needs_nothing_heavy():
    """So that it can be asked before the first large allocation."""
    assert "keep_freed_memory" in runpy.run_path(str(ROOT / "apart_hf/utils/allocator.py"))
