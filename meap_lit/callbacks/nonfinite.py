"""A run whose loss is no longer a number stops, and such a model is kept out of every checkpoint."""

from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from meap_lit.callbacks.ranks import Ranks
from meap_lit.errors import UserError
from meap_lit.logged import is_logged


class StopOnNonFiniteLoss(L.Callback):
    """Stops the run when the loss is no longer a number, and keeps such a model out of every checkpoint.

    The loss is looked at where it lies: the first bad step is kept on the device and read only where the host waits
    anyway, at steps that are logged, at validation and at saving.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss: Tensor = outputs["loss"]
        is_new = ~torch.isfinite(loss) & (self._first_bad_step < 0)
        step = batch_idx // trainer.accumulate_grad_batches + 1
        self._first_bad_step.masked_fill_(is_new, step)
        at_step_end = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if at_step_end and is_logged(trainer, trainer.global_step):
            self._check(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._check(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer)

    def _check(self, trainer: L.Trainer) -> None:
        is_bad = bool(self._first_bad_step >= 0)
        if trainer.strategy.reduce_boolean_decision(is_bad, all=False):  # one rank may see it steps before the others
            Ranks(trainer).do(partial(self._complain, trainer))

    def _complain(self, trainer: L.Trainer) -> None:
        step = int(self._first_bad_step)
        if step >= 0:
            saver = trainer.checkpoint_callback
            last = getattr(saver, "last_saved", None) or "none was saved yet"
            raise UserError(
                f"the training loss is not finite at optimizer step {step}; last good checkpoint: {last}; "
                f"resume from it (--ckpt_path) with a lower --model.optimizer.lr or check the data"
            )
