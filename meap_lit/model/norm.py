"""RMSNorm (arXiv 1910.07467), computed in float32 and returned in the dtype of the matrix products that read it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from meap_lit.model.compiled import own
from meap_lit.model.precision import matmul_dtype


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm over the last dimension; see `rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`.

    Under autocast the linears that read the result would each cast it for themselves and keep their copy for the
    backward; it is returned in their dtype, so that they share one.

    Args:
        x: [..., D].
        weight: [D].
        eps: Added to the mean square.

    Returns:
        [..., D], in the autocast dtype, if autocast is on, else in that of `x`.
    """
    dtype = matmul_dtype(x)
    weight = weight.to(dtype)
    if x.is_cuda:  # one kernel, if the dtypes are the same
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(dtype)
    return _RMSNorm.apply(x, weight, eps, dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and 1 / rms, as the fused kernel does; torch's own composition of operations keeps twice that
    and passes over it twice as often.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rrms = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, rrms)
        return own((wide * rrms).mul_(weight).to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, rrms = ctx.saved_tensors
        grad, normed = grad.to(rrms.dtype), x.to(rrms.dtype) * rrms
        product = grad * normed
        grad_weight = product.reshape(-1, len(weight)).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            along = (product * weight).mean(-1, keepdim=True)  # the part of the gradient that changes the length only
            grad_x = (grad * weight).addcmul_(normed, along, value=-1).mul_(rrms).to(x.dtype)
        return grad_x, grad_weight, None, None
