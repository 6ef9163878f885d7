"""Measure work in a new process, whose memory nothing else has filled or fragmented."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from meap_lit.errors import UserError

STATUS = Path("/proc/self/status")
Result = TypeVar("Result")


def in_fresh_process(work: Callable[[], Result]) -> Result:
    """What `work` returns in a process started for it; it is pickled, and so is its result.

    Raises:
        RuntimeError: If the process ends without a result.
    """
    # tensors from 64 KiB on are mapped, and given back when freed, so that a peak is one of live tensors
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        worker = Worker(partial(partial, work))
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
    with worker:
        return worker()


class Worker(Generic[Result]):
    """A process started for it, which makes something to call and calls it whenever this is called.

    Args:
        make: Called once in the process; it is pickled, what it makes is not, and each result of that is.
    """

    def __init__(self, make: Callable[[], Callable[[], Result]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, theirs))
        self._process.start()
        theirs.close()

    def __call__(self) -> Result:
        """What the process returns.

        Raises:
            RuntimeError: If it ends without a result.
        """
        try:
            self._connection.send(None)
            return self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise RuntimeError("a process of the benchmark ended without a result; its error is above") from None

    def __enter__(self) -> "Worker[Result]":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()


def _serve(make: Callable[[], Callable[[], Any]], connection: Connection) -> None:
    work = make()
    with contextlib.suppress(EOFError):
        while True:
            connection.recv()
            connection.send(work())


class Growth:
    """Bytes by which this process has grown at most since this was made.

    Raises:
        UserError: On systems other than Linux.
    """

    def __init__(self) -> None:
        self._before = memory("VmRSS")

    def __call__(self) -> int:
        return memory("VmHWM") - self._before


def memory(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Return the bytes of this process now (`VmRSS`) or at its peak (`VmHWM`).

    Raises:
        UserError: On systems other than Linux.
    """
    if not STATUS.is_file():
        raise UserError(f"peak memory is read from {STATUS}, which this system does not have; run it on Linux")
    # not ru_maxrss, which a process inherits from the one that started it
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
