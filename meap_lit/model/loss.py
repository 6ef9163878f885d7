"""Next-token cross entropy from hidden states, without ever holding the full [B, T, V] logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from meap_lit.model.precision import matmul_dtype

IGNORE_INDEX = -100
"""Label of a position that is not supervised, as in `torch.nn.functional.cross_entropy`."""

MAX_LOGITS = 2**25
"""Logits that are in float32 at once: 128 MiB, 1,046 rows of a 32,064-token vocabulary. A few copies live at once."""


def piece_rows(vocab_size: int) -> int:
    """Return the rows of one piece: as many as `MAX_LOGITS` holds, but at least 1,024, and a multiple of 256.

    Each piece reads and writes the whole gradient of the head, [V, D] in float32, so pieces must not become small where
    the vocabulary is large. Matrix products on a GPU waste work on other sizes.
    """
    return max(1024, MAX_LOGITS // vocab_size // 256 * 256)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy of `hidden @ weight.T` against `labels`, and the loss of each row.

    Rows are taken in pieces of `piece_rows`. Their gradients are formed in the same pass while the
    piece's logits are at hand and only scaled in the backward, so nothing is computed twice and peak memory does
    not grow with B * T * V. Without grad mode no gradients are formed. As they are scaled in place, the backward can
    be taken once; torch raises RuntimeError at a second.

    Matrix products run in the autocast dtype, if autocast is on; softmax, sum and the head's gradient accumulate in
    float32. Meant for float32 and bfloat16: in float16 small gradients would underflow before a loss scale meets them.

    Args:
        hidden: Hidden states, [..., D].
        weight: Head, [V, D].
        labels: Target ids, [...], int64; rows with `IGNORE_INDEX` count nothing.
        positions: Places of the supervised rows in the flattened labels, [S], int64. The others are then left out of
            every product. All rows are computed if not given.

    Returns:
        A tuple of the summed loss of the supervised rows, a float32 scalar (float64 if the inputs are float64), and the
        loss of each row, a float32 tensor of shape [...] that is detached and 0 in rows without supervision.
    """
    rows, targets = hidden.flatten(0, -2), labels.flatten()
    if positions is not None:
        rows, targets = rows.index_select(0, positions), targets.index_select(0, positions)  # [S, D], [S]
    # inside the function grad mode is off, and needs_input_grad ignores it
    total, losses = _LinearCrossEntropy.apply(rows, weight, targets, torch.is_grad_enabled())
    if positions is not None:
        losses = losses.new_zeros(labels.numel()).index_copy_(0, positions, losses)
    return total, losses.view(labels.shape)


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
        with_gradient = grad_hidden is not None or grad_weight is not None
        rows = piece_rows(weight.size(0))
        for start in range(0, hidden.size(0), rows):
            piece, target = hidden[start : start + rows].to(dtype), labels[start : start + rows]
            logits = F.linear(piece, head)  # [rows, V]
            losses = _losses(logits, target, sum_dtype, logits_become_gradient=with_gradient)
            row_losses[start : start + rows] = losses
            total += losses.sum()
            grad = logits
            supervised = (target != IGNORE_INDEX)[:, None]  # taken into account where rows are D long, not V
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = grad @ head * supervised
            if grad_weight is not None:
                _add_product_(grad_weight, grad, piece * supervised)
            del logits, grad  # else they would be in memory together with those of the next piece
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


def _losses(logits: Tensor, labels: Tensor, dtype: torch.dtype, logits_become_gradient: bool) -> Tensor:
    """Return the loss of each row, [rows], `dtype`; on request the gradient of their sum replaces the logits.

    The softmax is in `dtype`, of at most `MAX_LOGITS` at once.
    """
    rows = max(1, MAX_LOGITS // logits.size(1))
    losses = []
    for part, target in zip(logits.split(rows), labels.split(rows), strict=True):
        log_probs = F.log_softmax(part, dim=-1, dtype=dtype)
        losses.append(F.nll_loss(log_probs, target, ignore_index=IGNORE_INDEX, reduction="none"))
        if logits_become_gradient:
            grad = log_probs.exp_()  # softmax less one-hot
            grad[torch.arange(len(target), device=target.device), target.clamp(min=0)] -= 1.0
            part.copy_(grad)
            del grad
        del log_probs
    return torch.cat(losses)


def _add_product_(total: Tensor, grad: Tensor, piece: Tensor) -> None:
    """Add `grad.T @ piece`, [V, D], to `total` without forming it whole, which would take as much as the head."""
    if total.dtype == piece.dtype:
        total.addmm_(grad.T, piece)
    elif total.is_cuda and total.dtype == torch.float32:  # the sum is never rounded to bfloat16
        torch.addmm(total, grad.T, piece, out_dtype=torch.float32, out=total)
    else:
        rows = max(1, MAX_LOGITS // total.size(1))
        for part, columns in zip(total.split(rows), grad.split(rows, dim=1), strict=True):
            part += columns.T @ piece
