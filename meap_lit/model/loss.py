"""Next-token cross entropy from hidden states, without ever holding the full [B, T, V] logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from meap_lit.model.norm import matmul_dtype

IGNORE_INDEX = -100
"""Label of a position that is not supervised, as in `torch.nn.functional.cross_entropy`."""

MAX_LOGITS = 2**25
"""Logits of one piece: 128 MiB in float32, 1,046 rows of a 32,064-token vocabulary. A few copies live at once."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross entropy of `hidden @ weight.T` against `labels`.

    Rows are taken in pieces of at most `MAX_LOGITS` logits. Their gradients are formed in the same pass while the
    piece's logits are at hand and only scaled in the backward, so nothing is computed twice and peak memory does
    not grow with B * T * V. Without grad mode no gradients are formed. As they are scaled in place, the backward can
    be taken once; torch raises RuntimeError at a second.

    Matrix products run in the autocast dtype, if autocast is on; softmax, sum and the head's gradient accumulate in
    float32. Meant for float32 and bfloat16: in float16 small gradients would underflow before a loss scale meets them.

    Args:
        hidden: Hidden states, [..., D].
        weight: Head, [V, D].
        labels: Target ids, [...], int64; rows with `IGNORE_INDEX` count nothing.

    Returns:
        Sum over the supervised rows, scalar, float32 (float64 for such inputs). Divide by their number for the mean.
    """
    return linear_cross_entropy_of_rows(hidden, weight, labels)[0]


def linear_cross_entropy_of_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `linear_cross_entropy` does, and the loss of each row, so that a part of it can be logged apart.

    The losses of the rows are [...], float32, without gradient, 0 where not supervised.
    """
    total, rows = _LinearCrossEntropy.apply(
        hidden.flatten(0, -2),
        weight,
        labels.flatten(),
        torch.is_grad_enabled(),  # inside the function grad mode is off, and needs_input_grad ignores it
    )
    return total, rows.view(labels.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, grad_enabled: bool) -> tuple[Tensor, Tensor]:
        device = hidden.device
        dtype = matmul_dtype(hidden)
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        head = weight.to(dtype)  # once, not for each piece
        grad_hidden = torch.empty_like(hidden) if grad_enabled and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if grad_enabled and ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=sum_dtype, device=device)
        row_losses = torch.empty(len(labels), dtype=torch.float32, device=device)
        rows = max(1, MAX_LOGITS // weight.size(0))
        for start in range(0, hidden.size(0), rows):
            piece, target = hidden[start : start + rows].to(dtype), labels[start : start + rows]
            log_probs = F.log_softmax(F.linear(piece, head), dim=-1, dtype=sum_dtype)  # [rows, V]
            losses = F.nll_loss(log_probs, target, ignore_index=IGNORE_INDEX, reduction="none")
            row_losses[start : start + rows] = losses
            total += losses.sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad = log_probs.exp_()  # [rows, V], softmax less one-hot
            grad[torch.arange(len(target), device=device), target.clamp(min=0)] -= 1.0
            grad = grad.to(dtype)
            supervised = (target != IGNORE_INDEX)[:, None]  # taken into account where rows are D long, not V
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = grad @ head * supervised
            if grad_weight is not None:
                _add_product_(grad_weight, grad, piece * supervised)
            del log_probs, grad  # else they would be in memory together with those of the next piece
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(row_losses)
        return total, row_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        for saved in (grad_hidden, grad_weight):
            if saved is not None:
                saved *= grad  # in place: a scaled copy would be one more tensor as large as the head
        return grad_hidden, grad_weight, None, None


def _add_product_(total: Tensor, grad: Tensor, piece: Tensor) -> None:
    """Add `grad.T @ piece`, [V, D], to `total` without forming it whole, which would take as much as the head."""
    if total.dtype == piece.dtype:
        total.addmm_(grad.T, piece)
        return
    rows = max(1, MAX_LOGITS // total.size(1))
    for part, columns in zip(total.split(rows), grad.split(rows, dim=1), strict=True):
        part += columns.T @ piece
