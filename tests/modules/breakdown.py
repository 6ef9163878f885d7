"""A callback that breaks the model during a run, as a fault on a device would."""

import lightning as L
import torch


class BreakAtStep7(L.Callback):
    """Writes an infinity into the weights before the eighth step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 7:
            with torch.no_grad():
                pl_module.decoder.norm.weight.fill_(torch.inf)
