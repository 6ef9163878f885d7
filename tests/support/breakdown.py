"""Callbacks that break the model during a run, as a fault on a device would, end it early, or change its options."""

from typing import Any

import lightning as L
import torch

from meap_lit.modules import AdamW


class BreakAtStep7(L.Callback):
    """Writes an infinity into the weights before the eighth step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 7:
            with torch.no_grad():
                pl_module.decoder.norm.weight.fill_(torch.inf)


class OverflowAtStep(L.Callback):
    """Puts one infinity into the gradients of step number `step`, on one rank, as an overflow in a backward does."""

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step = step
        self.rank = rank

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step + 1 == self.step and trainer.global_rank == self.rank:
            grad = pl_module.decoder.layers[0].mlp.down_proj.weight.grad
            grad = grad.to_local() if hasattr(grad, "to_local") else grad
            grad[0, 0] = torch.inf


class StopAtStep7(L.Callback):
    """Ends the run after its seventh step, as `trainer.max_time` may."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= 7


class ChangeOptimizer(L.Callback):
    """Gives the run other options of its optimizer after certain steps, as one that never stopped would change them."""

    def __init__(self, changes: dict[int, dict[str, Any]]) -> None:
        self.changes = changes

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.changes:
            pl_module.optimizer = AdamW(**self.changes[trainer.global_step])
