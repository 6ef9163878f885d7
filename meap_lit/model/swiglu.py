"""The gated product of a SwiGLU (arXiv 2002.05202)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from meap_lit.model.compiled import own


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, all [..., F] and of one dtype; keeps only its inputs for the backward."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """Product that recomputes silu(gate) in the backward pass, which saves a quarter of the activations of an MLP."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return own(F.silu(gate).mul_(up))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
