"""The signals that ask a run to stop."""

from __future__ import annotations

import os
import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))


def in_a_group_of_its_own(worker: int) -> None:
    """For loader processes: launchers and terminals signal a whole group, and the run needs them to finish its step.

    They end with the run, which tells them to.
    """
    os.setpgrp()
