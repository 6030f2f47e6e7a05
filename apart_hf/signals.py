"""The signals that ask a run to stop."""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))


def outlive_first_signal(worker: int) -> None:
    """For loader processes: launchers signal a whole group, and the run still needs its loaders to finish its step.

    They end with the run; a second signal ends them at once.
    """
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))
