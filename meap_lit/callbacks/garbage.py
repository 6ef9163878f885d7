"""Collect Python's garbage on all ranks at the same steps."""

import gc
from typing import Any

import lightning as L

from meap_lit.modules.log_steps import ends_step


class CollectGarbage(L.Callback):
    """Turn Python's collector off while training, and call it after every 100th step and every validation.

    By itself it runs on each rank at another step, and all ranks wait for the one that it stops. Validations collect
    everything; between them the youngest objects suffice.
    """

    every_n_steps = 100

    def __init__(self) -> None:
        self._was_on = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._was_on = gc.isenabled()
        gc.collect()
        gc.disable()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx) and trainer.global_step % self.every_n_steps == 0:
            gc.collect(1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not gc.isenabled():
            gc.collect()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._turn_on()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._turn_on()

    def _turn_on(self) -> None:
        if self._was_on:
            gc.enable()
