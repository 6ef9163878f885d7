"""What an `autograd.Function` owes to the compiler."""

import torch
from torch import Tensor


def own(y: Tensor) -> Tensor:
    """Return `y`, or a copy of it while a compiler traces, for the result of a forward that was written in place.

    torch 2.11 loses the gradient of a compiled function that returns such a tensor, or an argument's cast to its own
    dtype (https://github.com/pytorch/pytorch/issues/180642). The copy is fused away.
    """
    return y.clone() if torch.compiler.is_compiling() else y
