"""RMSNorm against its formula and torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meap_lit.model.norm import RMSNorm, rms_norm


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def test_by_hand() -> None:
    """(3, 4) has a mean square of 12.5; with eps 12.5 its root is 5."""
    y = rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), eps=12.5)
    torch.testing.assert_close(y, torch.tensor([0.6, 1.6]))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4, 6)])
def test_gradients_are_those_of_finite_differences(shape: tuple[int, ...]) -> None:
    x, weight = inputs(*shape)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-5), (x, weight))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.0)])
def test_it_is_torchs(dtype: torch.dtype, tolerance: float) -> None:
    x, weight = inputs(2, 7, 4, 32, dtype=dtype)
    x_heads = x.transpose(1, 2)  # as gradients of heads come
    ours, theirs = (norm(x_heads, weight) for norm in (_ours, _torchs))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    up = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).to(dtype).view_as(ours)
    for mine, other in zip(*(torch.autograd.grad(y, (x, weight), up) for y in (ours, theirs)), strict=True):
        assert mine.dtype == dtype
        bound = {torch.bfloat16: 0.02}.get(dtype, 10 * tolerance)  # bfloat16 rounds in each of torch's operations
        torch.testing.assert_close(mine, other, atol=bound * float(other.abs().max()), rtol=0)


def _ours(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-6)


def _torchs(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def test_under_autocast_linears_share_one_result() -> None:
    x, weight = inputs(3, 16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = rms_norm(x, weight, 1e-6)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rms_norm(x, weight.bfloat16().float(), 1e-6).bfloat16())
    saved: list[Tensor] = []
    linears = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(3))
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        y = rms_norm(x, weight, 1e-6)
        for linear in linears:
            linear(y)
    kept = {t.untyped_storage().data_ptr() for t in saved if t.shape == x.shape}
    assert kept == {x.untyped_storage().data_ptr(), y.untyped_storage().data_ptr()}


@pytest.mark.parametrize("trained", ["x", "weight"])
def test_one_gradient_alone(trained: str) -> None:
    x, weight = inputs(3, 8)
    expected = dict(zip(("x", "weight"), torch.autograd.grad(_ours(x, weight).sum(), (x, weight)), strict=True))
    leaves = {"x": x, "weight": weight}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == trained)
    (gradient,) = torch.autograd.grad(_ours(x, weight).sum(), leaves[trained])
    assert torch.equal(gradient, expected[trained])


def test_the_module_is_torchs_with_the_same_parameters() -> None:
    ours, theirs = RMSNorm(8, eps=1e-5), nn.RMSNorm(8, eps=1e-5)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x, _ = inputs(3, 8, dtype=torch.float32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_on_the_meta_device() -> None:
    y = RMSNorm(8, eps=1e-5, device="meta")(torch.empty(3, 8, device="meta"))
    assert (y.shape, y.device.type) == ((3, 8), "meta")
