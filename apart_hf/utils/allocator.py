"""glibc's allocator, told to keep what is freed: a training step takes again what the step before it gave back."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Mapping

# the parameters of mallopt(3), see malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLDS = 2**30, 4 * 2**20 * ctypes.sizeof(ctypes.c_long)  # the second is the bound of older versions
_KEPT = 2**31 - 1  # bytes at the end of the heap that stay there
_TOP = 2**26  # bytes by which it grows beyond what is asked for


class _SymbolInfo(ctypes.Structure):
    """Lays out what dladdr(3) finds."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next allocations, rather than hand it back to the kernel.

    A step frees its activations, and the next one allocates them again: page by page, at 5 to 7 % of the step's time,
    where the kernel has them in between. It takes effect once, before the first large allocation. Processes that are
    forked inherit it; the process then stays as large as it was at its peak.

    Returns:
        Whether the thresholds were set. Nothing happens on other systems than Linux, with another C library than glibc,
        with another allocator in its place (jemalloc, tcmalloc), and where the user has set up malloc by variables.
    """
    if not sys.platform.startswith("linux") or is_set_up(os.environ):
        return False
    try:
        process = ctypes.CDLL(None)
        return _is_glibc(process) and _raise_thresholds(process)
    except (OSError, AttributeError):  # no dynamic library, or one without these functions
        return False


def is_set_up(environment: Mapping[str, str]) -> bool:
    """Tell whether variables say how malloc is to work, so that it is left as they say."""
    return "glibc.malloc." in environment.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in environment
    )


def _is_glibc(process: ctypes.CDLL) -> bool:
    """Tell whether malloc is that of glibc; a library that is preloaded has its own."""
    return _library(process, "malloc") == _library(process, "gnu_get_libc_version")


def _library(process: ctypes.CDLL, function: str) -> int:
    """Find where the library is loaded that a function is from.

    Raises:
        AttributeError: where there is no such function.
        OSError: where it is of no library.
    """
    found = _SymbolInfo()
    if not process.dladdr(ctypes.cast(getattr(process, function), ctypes.c_void_p), ctypes.byref(found)):
        raise OSError(f"{function} is of no library")
    return found.base


def _raise_thresholds(process: ctypes.CDLL) -> bool:
    """Set the thresholds; the others would do harm without the first, which they keep from growing by itself."""
    if not any(process.mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST_MMAP_THRESHOLDS):
        return False
    return bool(process.mallopt(_TRIM_THRESHOLD, _KEPT)) and bool(process.mallopt(_TOP_PAD, _TOP))
