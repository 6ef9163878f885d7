"""AdamW and its learning-rate schedule; the defaults are the paper's."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from meap_lit.errors import UserError, check_range


@dataclass(frozen=True)
class AdamW:
    """AdamW with a linear warm-up and a cosine decay; the defaults are the paper's.

    Args:
        lr: Peak learning rate.
        final_lr: Learning rate at the last step.
        warmup_share: Share of the steps over which the rate climbs from 0 to `lr`.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of matrices; norms and biases are never decayed.
    """

    lr: float = 4e-4
    final_lr: float = 4e-5
    warmup_share: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        check_range("model.optimizer.lr", self.lr, "(0, 1]")  # Adam moves every weight by about so much
        if not 0 <= self.final_lr <= self.lr:
            raise UserError(
                f"model.optimizer.final_lr must be in [0, model.optimizer.lr = {self.lr:g}], got {self.final_lr:g}"
            )
        check_range("model.optimizer.warmup_share", self.warmup_share, "[0, 1]")
        for beta in self.betas:
            check_range("model.optimizer.betas", beta, "[0, 1)")
        check_range("model.optimizer.eps", self.eps, "(0, 1)")
        if not 0 <= self.weight_decay * self.lr < 1:  # a step takes this share of every weight
            raise UserError(
                f"model.optimizer.weight_decay must be in [0, 1 / model.optimizer.lr), got {self.weight_decay:g}"
            )

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """Return the optimizer of the trained parameters of `model`; matrices decay, vectors do not."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2]},
            {"params": [p for p in parameters if p.dim() < 2]},
        ]
        optimizer = torch.optim.AdamW(groups, fused=True)
        self.set_options(optimizer, lr=self.lr)
        return optimizer

    def set_options(self, optimizer: torch.optim.Optimizer, *, lr: float) -> None:
        """Set all options of the next update of an optimizer that `build` made.

        Called before every update, since restoring a checkpoint brings back the options of the run that wrote it.
        """
        matrices, vectors = optimizer.param_groups
        matrices["weight_decay"], vectors["weight_decay"] = self.weight_decay, 0.0
        for group in (matrices, vectors):
            group.update(lr=lr, betas=self.betas, eps=self.eps)

    def lr_factor(self, step: int, max_steps: int) -> float:
        """Return the learning rate of the update after `step` earlier ones, as a share of the peak."""
        warmup = round(self.warmup_share * max_steps)
        if step < warmup:
            return (step + 1) / warmup
        floor = self.final_lr / self.lr
        progress = min(1.0, (step - warmup) / max(1, max_steps - 1 - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
