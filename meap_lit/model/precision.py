"""Where a model under autocast (bf16-mixed) computes in bfloat16 and where in float32, the same with any strategy.

Every weight is used in the autocast dtype: those of linear layers by autocast itself, those of embedding, norms and
head by the functions here. FSDP2 gathers all weights in that dtype, so a forward is the same with it and without it.
What is between the products is in float32: the residual stream, the rotation angles, norms inside, the softmax of the
loss.
"""

import torch
from torch import Tensor


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer would multiply `x`: that of autocast, if it is on."""
    return _autocast_dtype(x) or x.dtype


def residual(embedded: Tensor) -> Tensor:
    """Return embedded tokens, [B, T, D], as the start of the residual stream: in float32 under autocast."""
    dtype = _autocast_dtype(embedded)
    return embedded if dtype is None else embedded.to(dtype).float()


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    is_on = device != "meta" and torch.is_autocast_enabled(device)  # which raises for devices without autocast
    return torch.get_autocast_dtype(device) if is_on else None
