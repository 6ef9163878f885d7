"""Freed memory stays in a process that computes on its CPU."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PAGES = """
import resource
from meap_lit.modules.cpu_memory import keep_freed_memory
keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def touch():
    block = libc.malloc(48 << 20)
    ctypes.memset(block, 1, 48 << 20)
    libc.free(block)
touch()
before = faults()
touch()
print(faults() - before)
"""


def faults(**environment: str) -> int:
    """Pages that the system hands out when 48 MiB are taken a second time."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    result = subprocess.run(
        [sys.executable, "-c", PAGES], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_a_large_block_is_taken_again_without_new_pages() -> None:
    assert faults() < 100
    assert faults(MALLOC_MMAP_THRESHOLD_="65536") > 1000, "the environment takes precedence"
