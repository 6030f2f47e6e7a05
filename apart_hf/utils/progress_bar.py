"""Progress bars: where somebody watches, on a terminal or in a notebook, by one process of each machine."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any


def is_watched() -> bool:
    """Tell whether bars are shown: standard error is a terminal, or what runs is a cell of a notebook."""
    return sys.stderr.isatty() or "ipykernel.zmqshell" in sys.modules  # by which tqdm knows a notebook, too


def progress_bar(iterable: Iterable[Any], title: str | None, **options: Any) -> Any:
    """Put tqdm's bar around an iterable; it goes when it is done, and there is none where nobody watches.

    Args:
        iterable: what is iterated over.
        title: stands before the bar; None: there is no bar.
        **options: of `tqdm.auto.tqdm`, such as unit, initial and total.

    Returns:
        The bar, which gives what the iterable gives.
    """
    from accelerate.utils import tqdm  # a second and a half, which command lines that show none need not take

    return tqdm(iterable, desc=title, leave=False, disable=title is None or not is_watched(), **options)
