"""End a run when one of its ranks hangs, and name that rank."""

import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar

import lightning as L
import torch.distributed as dist

from meap_lit.errors import check_range

STATUS = 1
"""Exit status of a run that is ended here."""


@dataclass
class Whereabouts:
    """The last report of a rank."""

    rank: int
    host: str
    pid: int
    marks: int = 0
    """Batches and saves begun or ended since training started. The rank that the others wait for has the fewest."""
    where: str = "at the start"
    idle_s: float = 0.0
    """Time since the last mark."""
    beats: int = 0
    """Number of reports. It no longer grows if the process is stopped or dead."""

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


class StopOnHang(L.Callback):
    """End a run of several ranks when one makes no progress for a while, and name the rank that is behind.

    PyTorch's own timeout (30 minutes by default) ends a collective operation too, but each waiting rank then names
    itself. Here every rank counts the batches and saves that it begins and ends, and a thread reports the count to the
    store of the process group.

    Args:
        timeout_minutes: Minutes without progress. It must exceed the time of a save, a download or a compilation. None
            never ends a run.

    Raises:
        UserError: If the timeout is not above 0.
    """

    off: ClassVar[dict[str, Any]] = {"timeout_minutes": None}
    """The options that `hang: null` sets."""

    def __init__(self, timeout_minutes: float | None = 15.0) -> None:
        check_range("hang.timeout_minutes", timeout_minutes, "(0, inf)", "; null is for never")
        self.timeout_minutes = timeout_minutes
        self._watch: _Watch | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1 and self.timeout_minutes is not None:
            self._watch = _Watch(trainer, self.timeout_minutes * 60)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def _mark(self, where: str) -> None:
        if self._watch is not None:
            self._watch.mark(where)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._mark(f"in optimizer step {trainer.global_step + 1}")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._mark(f"reading the next batch after optimizer step {trainer.global_step}")

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._mark(f"in the validation after optimizer step {trainer.global_step}")

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._mark(f"reading the next batch of the validation after optimizer step {trainer.global_step}")

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._mark(f"at the end of the validation after optimizer step {trainer.global_step}")

    def on_save_checkpoint(self, trainer: L.Trainer, *args: Any) -> None:
        self._mark(f"at the checkpoint of optimizer step {trainer.global_step}")


class _Watch:
    """The thread that watches one rank."""

    def __init__(self, trainer: L.Trainer, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.interval_s = min(30.0, timeout_s / 10)
        self.launcher = trainer.strategy.launcher
        self.num_ranks = trainer.world_size
        # rank 0 of a node reports first: the ranks that Lightning started end with it
        self.grace_s = 0.0 if trainer.local_rank == 0 else 4 * self.interval_s
        self.me = Whereabouts(trainer.global_rank, socket.gethostname(), os.getpid())
        self.patience_s = max(10.0, 2 * self.interval_s)
        # a connection of its own: a call that waits would block the training's
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=self.patience_s))
        self.store = dist.PrefixStore("hang", store)
        self._since = time.monotonic()
        self._stopped = threading.Event()
        self._tell()
        self._thread = threading.Thread(target=self._run, name="hang-watch", daemon=True)
        self._thread.start()

    def mark(self, where: str) -> None:
        self.me.marks += 1
        self.me.where = where
        self._since = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(self.patience_s)  # a call to the store while Python shuts down aborts the process

    def _tell(self) -> None:
        self.me.idle_s = time.monotonic() - self._since
        self.me.beats += 1
        self.store.set(str(self.me.rank), json.dumps(asdict(self.me)))

    def _run(self) -> None:
        readings: list[dict[int, Whereabouts]] = []  # since the timeout
        while not self._stopped.wait(self.interval_s):
            try:
                self._tell()
                if self._is_in_time():
                    readings.clear()
                    continue
                readings.append(self._read())
            except dist.DistError as error:
                if not self._is_in_time():  # the training may still go on without the store
                    self._end(f"the store of rank 0 does not answer ({str(error).splitlines()[0]})")
            if len(readings) > 3:  # several beats apart, so that a stopped process shows
                self._end(blame(readings[0], readings[-1], self.num_ranks))

    def _is_in_time(self) -> bool:
        return self.me.idle_s < self.timeout_s + self.grace_s

    def _read(self) -> dict[int, Whereabouts]:
        """Return the last report of each rank.

        A separate thread asks. If the process with the store is stopped, torch's client never returns, because even its
        timeout waits for an answer of the store.

        Raises:
            DistError: If the store does not answer.
        """
        answers: queue.SimpleQueue[dict[int, Whereabouts] | dist.DistError] = queue.SimpleQueue()

        def ask() -> None:
            try:
                known = [rank for rank in range(self.num_ranks) if self.store.check([str(rank)])]
                answers.put({rank: Whereabouts(**json.loads(self.store.get(str(rank)))) for rank in known})
            except dist.DistError as error:
                answers.put(error)

        threading.Thread(target=ask, name="hang-watch-ask", daemon=True).start()
        try:
            answer = answers.get(timeout=self.patience_s)
        except queue.Empty:
            raise dist.DistStoreError(f"no answer in {self.patience_s:g} s") from None
        if isinstance(answer, dist.DistError):
            raise answer
        return answer

    def _end(self, reason: str) -> None:
        if self._stopped.is_set():
            return
        print(
            f"error: no progress on {self.me} for {self.me.idle_s:.0f} s (hang.timeout_minutes "
            f"{self.timeout_s / 60:g}): {reason}; look there, then resume with --ckpt_path last",
            file=sys.stderr,
            flush=True,
        )
        if hasattr(self.launcher, "kill"):
            self.launcher.kill(signal.SIGKILL)
        os._exit(STATUS)  # the main thread waits in C++ for the other ranks


def blame(before: Mapping[int, Whereabouts], after: Mapping[int, Whereabouts], num_ranks: int) -> str:
    """Return in words which ranks the others wait for.

    Args:
        before: Report of each rank; a rank that never reported is missing.
        after: Its report some beats later.
        num_ranks: Number of ranks.
    """
    unheard = sorted(set(range(num_ranks)) - after.keys())
    if unheard:
        return f"rank {', '.join(map(str, unheard))} has never reported"
    silent = [after[rank] for rank in before if after[rank].beats == before[rank].beats]
    if silent:
        names = ", ".join(map(str, silent))
        return f"{names} has not reported since it was {silent[0].where}: the process has stopped or ended"
    fewest = min(told.marks for told in after.values())
    behind = [told for told in after.values() if told.marks == fewest]
    if len(behind) == num_ranks:
        return f"all ranks are {behind[0].where}: they wait for the network, storage or their devices"
    return f"the others wait for {', '.join(map(str, behind))}, which is {behind[0].where}"
