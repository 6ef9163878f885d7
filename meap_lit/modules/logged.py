"""Which optimizer steps are logged. At the others nothing is asked of the device, so that the host runs ahead of it."""

import lightning as L
import torch
from torch import Tensor


def is_logged(trainer: L.Trainer, step: int) -> bool:
    """Whether optimizer step number `step`, counted from 1, is logged: every `log_every_n_steps`th, and the last."""
    return step % trainer.log_every_n_steps == 0 or step == trainer.max_steps


def host_number(value: float) -> Tensor:
    """A number of the host as `log` leaves it there; of a float Lightning makes a tensor on the device, and waits."""
    return torch.tensor(float(value))
