"""Keep freed memory in a process that trains on its CPU."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors in the process, for later tensors of their size.

    glibc maps a large tensor anew each time (from 32 MiB on, or less) and returns the free end of its heap, and the
    system then clears every page that is touched again: a tenth of a training step in bfloat16 (benchmarks/log.md).
    Settings of the environment (`MALLOC_MMAP_THRESHOLD_` and the like) take precedence; without Linux and
    glibc this does nothing.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
