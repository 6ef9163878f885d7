"""Checks that are meant for a GPU; on a CPU they run at toy size, so that their code is known to run."""

import pytest
import torch
from torch import Tensor

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])


def relative_error(tensor: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference as a share of the norm of `exact`."""
    return ((tensor.double() - exact).norm() / exact.norm()).item()
