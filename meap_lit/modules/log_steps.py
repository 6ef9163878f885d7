"""Say where an optimizer step ends, and whether it is logged.

Steps that are not logged read nothing from the device, so the host can run ahead of it.
"""

import lightning as L
import torch
from torch import Tensor


def is_logged(trainer: L.Trainer, step: int) -> bool:
    """Return whether optimizer step `step`, counted from 1, is logged: every `log_every_n_steps`th, and the last."""
    return step % trainer.log_every_n_steps == 0 or step == trainer.max_steps


def ends_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Return whether a micro-batch is the last of its optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def host_number(value: float) -> Tensor:
    """Return a number as a tensor on the host; Lightning would copy a float to the device, and wait for it."""
    return torch.tensor(float(value), dtype=torch.float32)  # not bf16-true's default
