"""A callback that has the run told to stop at a given moment."""

import os

import lightning as L


class SignalAt(L.Callback):
    """Sends `number` to this process when the micro-batch `batch` begins."""

    def __init__(self, batch: int, number: int) -> None:
        self.batch = batch
        self.number = number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            os.kill(os.getpid(), self.number)
