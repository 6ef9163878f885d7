"""Apply a function to a stream in several processes, with the results in the order of the stream."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from meap_lit.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_BYTES_PER_WORKER = 4_000_000
_PENDING_PER_WORKER = 3  # one in work, one waiting, one finished: nobody waits for the slowest


def default_num_workers(num_bytes: int) -> int:
    """Return the number of processes for an input of `num_bytes`: one per core, fewer for a small input."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, num_bytes // _BYTES_PER_WORKER))


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    """Yield `function(item)` for every item, in order; with one worker in this process, with more in that many others.

    The function is sent to each worker once, and an exception it raises is raised here. Every worker tokenizes in a
    single thread. Items are read in this process, a few per worker ahead. The workers end when this process ends,
    however it ends; `UserError` is raised if one is killed.
    """
    if num_workers == 1:
        with _single_threaded_tokenizers():
            yield from map(function, items)
        return
    # spawned rather than forked: a fork of a process that has threads may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(function,))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(_call, item))
            if len(pending) >= _PENDING_PER_WORKER * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, usually because memory ran out; try fewer with --num_workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_function: Callable[[Any], Any] | None = None


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _worker_function
    _worker_function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End with the parent: a worker of a pool does not notice that it was killed, and waits for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    assert _worker_function is not None
    return _worker_function(item)


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    old = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if old is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = old
