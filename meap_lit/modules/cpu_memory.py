"""How a process that trains on its CPU keeps freed memory."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Leave freed tensors in a process that computes on its CPU, for the next of their size.

    glibc maps a large tensor anew each time (from 32 MiB on, or less) and gives the free end of its heap back, and the
    system then clears every page that is touched again: a tenth of a training step in bfloat16 (benchmarks/log.md).
    Settings of the environment (`MALLOC_MMAP_THRESHOLD_` and the like) take precedence; elsewhere than on Linux with
    glibc this does nothing.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
