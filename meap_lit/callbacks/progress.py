"""Show optimizer steps and the latest logged metrics as a progress bar."""

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from meap_lit.modules.log_steps import ends_step

SHOWN = {"train/loss": "loss", "throughput/tokens_per_second": "tokens/s"}
"""Training metrics of the bar, with shorter names. Lightning would read a `prog_bar` metric at every batch."""


class StepProgressBar(TQDMProgressBar):
    """Count optimizer steps of the whole run instead of micro-batches of an epoch.

    The bar advances at logged steps only, so that it never waits for the device.
    """

    def __init__(self) -> None:
        # fewer lines in a log file
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else 100)

    @property
    def total_train_batches(self) -> int:
        return self.trainer.max_steps

    @property
    def refresh_rate(self) -> int:
        every = self.trainer.log_every_n_steps if self.trainer.state.fn == "fit" else 1
        return -(-super().refresh_rate // every) * every

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        self._begin(trainer)  # a resumed run starts no epoch

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._begin(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        bar = self.train_progress_bar
        bar.reset(trainer.max_steps)
        bar.initial = bar.n = trainer.global_step
        bar.set_description("step")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def init_validation_tqdm(self) -> Tqdm:
        if self.trainer.state.fn == "validate":
            return super().init_validation_tqdm()
        return Tqdm(disable=True)  # a validation during training takes seconds

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int | str | float]:
        logged = trainer.callback_metrics
        metrics = {shown: logged[name].item() for name, shown in SHOWN.items() if name in logged}
        metrics |= super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
