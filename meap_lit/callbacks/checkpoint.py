"""When checkpoints are written, and that none is written of a broken model."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from meap_lit.errors import UserError


class Checkpoint(ModelCheckpoint):
    """Keeps the last checkpoints of a run, the final step always among them, and a link `last.ckpt` to the newest.

    `last.ckpt` is a link because Lightning's `save_last=True` overwrites the file in place, and a kill in between
    would leave a mixture.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
        keep: Number of checkpoints to keep; -1 keeps all.
        dirpath: Folder; `checkpoints` inside the logger's folder if not given.
    """

    def __init__(self, every_n_steps: int = 1000, keep: int = 2, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="{step}",
            monitor="step",
            mode="max",
            save_top_k=keep,
            save_last="link",
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["dirpath"] == self.dirpath:  # a resume in a new folder keeps no account of the old one
            super().load_state_dict(state_dict)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)


class StopOnNonFiniteLoss(L.Callback):
    """Stops the run when the loss is no longer a number, and keeps such a model out of every checkpoint.

    The loss is looked at where it lies: the first bad step is kept on the device and read only where the host waits
    anyway, at logging, validation and saving.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss: Tensor = outputs["loss"]
        is_new = ~torch.isfinite(loss) & (self._first_bad_step < 0)
        step = batch_idx // trainer.accumulate_grad_batches + 1
        self._first_bad_step = torch.where(is_new, step, self._first_bad_step)
        if trainer.global_step % trainer.log_every_n_steps == 0 or pl_module.device.type == "cpu":
            self._check(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._check(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer)

    def _check(self, trainer: L.Trainer) -> None:
        step = int(self._first_bad_step)
        if step >= 0:
            saver = trainer.checkpoint_callback
            last = getattr(saver, "best_model_path", "") or "none was saved yet"
            raise UserError(
                f"the training loss is not finite at optimizer step {step}; last good checkpoint: {last}; "
                f"resume from it (--ckpt_path) with a lower --model.optimizer.lr or check the data"
            )
