"""Work measured in a process of its own, which nothing before it has warmed, filled or fragmented."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from meap_lit.errors import UserError

STATUS = Path("/proc/self/status")
Result = TypeVar("Result")


def in_fresh_process(work: Callable[[], Result]) -> Result:
    """What `work` returns in a process started for it; it is pickled, and so is its result.

    Raises:
        RuntimeError: If the process ends without a result.
    """
    # tensors from 64 KiB on are mapped, and given back when freed, so that a peak is one of live tensors
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(work, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("a process of the benchmark ended without a result; its error is above") from None
    finally:
        process.join()


def _send(work: Callable[[], Any], sender: Any) -> None:
    sender.send(work())


class Growth:
    """Bytes by which this process has grown at most since this was made.

    Raises:
        UserError: On systems other than Linux.
    """

    def __init__(self) -> None:
        if not STATUS.is_file():
            raise UserError(f"peak memory is read from {STATUS}, which this system does not have; run it on Linux")
        self._before = _kilobytes("VmRSS:")

    def __call__(self) -> int:
        return 1024 * (_kilobytes("VmHWM:") - self._before)


def _kilobytes(field: str) -> int:
    return int(next(line for line in STATUS.read_text().splitlines() if line.startswith(field)).split()[1])
