"""What several processes of a run may each have to say is said once, by whichever of them meets it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

from apart_hf.utils.launcher import launch

PATIENCE = 2.0  # seconds that the others give the first process to say it
_OLD = 3600.0  # seconds after which the mark of another run is removed
_PREFIX = "apart_hf-said-"


def is_first_to_say(text: str) -> bool:
    """Say whether this process is to say something, which other processes of its run may have to say as well.

    The first process comes first; another one speaks where the first does not, within `PATIENCE`. Nobody can be asked:
    some errors come before the processes have met, others when some are gone. So the one that speaks leaves a mark, an
    almost empty file among the temporary ones of its machine.
    """
    started = launch()
    if started.processes == 1:
        return True
    mark = _mark(text)
    deadline = time.monotonic() + (PATIENCE if started.rank else 0.0)
    while not _is_of_another(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        return _leave(mark)
    except OSError:
        return True  # rather twice than not at all


def _leave(mark: Path) -> bool:
    """Leave a mark. Returns whether no other process of this run has."""
    try:
        with open(mark, "x") as file:  # of several at once, one makes it
            file.write(str(os.getpid()))
        for other in mark.parent.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                if other.stat().st_mtime < time.time() - _OLD:
                    other.unlink()
    except FileExistsError:
        if _is_of_another(mark):
            return False
        mark.write_text(str(os.getpid()))
    return True


def _mark(text: str) -> Path:
    """Name the file that says that a text was said by a process of this run."""
    user, run = getattr(os, "getuid", int)(), os.environ.get("MASTER_PORT") or os.getppid()
    digest = hashlib.sha256(f"{user} {run} {text}".encode()).hexdigest()
    return Path(tempfile.gettempdir()) / f"{_PREFIX}{digest[:24]}"


def _is_of_another(mark: Path) -> bool:
    """Tell whether another process has left this mark since this one began: an earlier run may have left the same."""
    import psutil  # for errors of several processes only

    try:
        when, who = mark.stat().st_mtime, mark.read_text()
    except OSError:
        return False
    return when >= psutil.Process().create_time() and who != str(os.getpid())
