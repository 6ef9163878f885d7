"""The machine that a process runs on: its processor's name, and how it hands out memory."""

import ctypes
import os
import platform
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def processor() -> str:
    """Name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")  # of Linux, where `platform.processor` is empty
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


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
