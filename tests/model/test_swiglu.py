"""SwiGLU against its formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meap_lit.model.swiglu import swiglu


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).to(dtype).unbind()
    return gate.clone().requires_grad_(), up.clone().requires_grad_()


def test_by_hand() -> None:
    """silu(0) is 0, and silu(ln 3) is 3/4 ln 3."""
    y = swiglu(torch.tensor([0.0, 1.0986123]), torch.tensor([5.0, 4.0]))
    torch.testing.assert_close(y, torch.tensor([0.0, 3 * 1.0986123]))


def test_gradients_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(swiglu, inputs(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_product_of_torchs_silu_to_the_bit(dtype: torch.dtype) -> None:
    gate, up = inputs(dtype)
    ours, plain = swiglu(gate, up), F.silu(gate) * up
    assert torch.equal(ours, plain)
    for mine, other in zip(*(torch.autograd.grad(y.sum(), (gate, up)) for y in (ours, plain)), strict=True):
        assert torch.equal(mine, other)


def test_only_its_inputs_are_kept() -> None:
    gate, up = inputs(torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(gate, up)
    assert {t.untyped_storage().data_ptr() for t in saved} == {t.untyped_storage().data_ptr() for t in (gate, up)}
