"""Callbacks that interrupt a run at a given moment."""

import multiprocessing
import os
import signal
import time

import lightning as L


class SignalAt(L.Callback):
    """Sends `number` to this process, or to that of one rank, when the micro-batch `batch` begins."""

    def __init__(self, batch: int, number: int, rank: int | None = None) -> None:
        self.batch = batch
        self.number = number
        self.rank = rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), self.number)


class SignalInValidation(L.Callback):
    """Sends `number` to this process in the middle of the first validation after `step`."""

    def __init__(self, step: int, number: int = int(signal.SIGTERM)) -> None:
        self.step = step
        self.number = number

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step >= self.step and batch_idx == 1:
            os.kill(os.getpid(), self.number)


class HangAt(L.Callback):
    """Has one rank hang, or its process stopped, when the micro-batch `batch` begins."""

    def __init__(self, rank: int, batch: int, stopped: bool = False) -> None:
        self.rank = rank
        self.batch = batch
        self.stopped = stopped

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            if self.stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)


class KillWorkerAt(L.Callback):
    """Kills a process that reads data when the micro-batch `batch` begins."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            [worker, *_] = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)


class FailOnFirstRank(L.Callback):
    """Has the first rank fail while the others are busy, as in a collective of a GPU, which does not notice."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == 0:
            raise RuntimeError("as asked")
        time.sleep(600)
