"""Work in a process of its own."""

import os
from functools import partial

import pytest

from benchmarks.fresh import Growth, in_fresh_process


def grow(num_bytes: int) -> tuple[int, int]:
    growth = Growth()
    block = bytearray(os.urandom(1)) * num_bytes
    del block
    return growth(), os.getpid()


def test_growth_is_that_of_the_work_alone() -> None:
    growth, process = in_fresh_process(partial(grow, 50_000_000))
    assert process != os.getpid()
    assert 49e6 < growth < 70e6


def test_a_process_that_ends_early_is_reported() -> None:
    with pytest.raises(RuntimeError, match="ended without a result"):
        in_fresh_process(partial(os._exit, 3))
