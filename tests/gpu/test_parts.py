"""The parts of the decoder against references in float64, written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.loss import measure
from meap_lit.model import IGNORE_INDEX, DecoderConfig, Documents, linear_cross_entropy
from meap_lit.model.attention import attention_within, causal_attention, packed_attention
from meap_lit.model.norm import rms_norm
from meap_lit.model.rope import apply_rope, rope_angles
from tests.support.devices import on_devices, on_gpu, relative_error


def random(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)


# ------------------------------------------------------------------------------------------------------- loss


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=IGNORE_INDEX, reduction="sum")


@on_devices
@pytest.mark.parametrize("bf16", [False, True])
def test_loss_is_as_exact_as_that_of_all_logits(device: str, bf16: bool) -> None:
    vocab, tokens, width = (320, 64, 32) if device == "cpu" else (32_064, 4096, 256)  # four pieces on a GPU
    hidden = random(tokens, width, device=device).requires_grad_()
    weight = random(vocab, width, device=device, seed=1).mul_(width**-0.5).requires_grad_()
    labels = torch.arange(tokens, device=device) * 7 % vocab
    labels[::5] = IGNORE_INDEX
    exact = plain(hidden.double(), weight.double(), labels)
    exact_results = [exact.detach(), *torch.autograd.grad(exact, (hidden, weight))]
    errors = {}
    for name, take in (("ours", lambda *x: linear_cross_entropy(*x)[0]), ("plain", plain)):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            total = take(hidden, weight, labels)
        results = [total.detach(), *torch.autograd.grad(total, (hidden, weight))]
        errors[name] = [relative_error(*pair) for pair in zip(results, exact_results, strict=True)]
    assert max(errors["ours"]) < (0.02 if bf16 else 1e-5)
    for ours, theirs in zip(*errors.values(), strict=True):
        assert ours < 1.5 * theirs + (1e-3 if bf16 else 1e-6)


@pytest.mark.parametrize(
    ("device", "vocab", "tokens", "width"),
    [("cpu", 1024, 64, 32), pytest.param("cuda", 128 * 1024, 8 * 4096, 4096, marks=on_gpu)],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_a_large_vocabulary_takes_less_than_two_gigabytes(
    device: str, vocab: int, tokens: int, width: int, bf16: bool
) -> None:
    """Beside weights and their gradients, as tests/model/test_loss.py counts it for the same sizes."""
    peak, _ = measure("ours", vocab, tokens, width, bf16, device)
    assert peak - 4 * width * vocab < 2e9


# ---------------------------------------------------------------------------------------------- norm, rotation


@on_devices
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.float32, False, 1e-5), (torch.bfloat16, False, 0.01), (torch.float32, True, 0.01)],
)
def test_rms_norm(device: str, dtype: torch.dtype, autocast: bool, tolerance: float) -> None:
    x = random(4, 64, 128, device=device).mul_(3).to(dtype).requires_grad_()
    weight = (1 + 0.1 * random(128, device=device, seed=1)).requires_grad_()
    grad = random(4, 64, 128, device=device, seed=2)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        y = rms_norm(x, weight, 1e-5)
    assert y.dtype == (torch.bfloat16 if autocast else dtype)
    wide = x.detach().double().requires_grad_()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert relative_error(y, exact) < tolerance
    gradients = torch.autograd.grad(y, (x, weight), grad.to(y.dtype))
    for ours, theirs in zip(gradients, torch.autograd.grad(exact, (wide, weight), grad.double()), strict=True):
        assert relative_error(ours, theirs) < tolerance


@on_devices
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_rotation_is_a_product_of_complex_numbers(device: str, dtype: torch.dtype, tolerance: float) -> None:
    config = DecoderConfig(
        num_layers=1, num_heads=2, num_kv_heads=2, hidden_size=128, intermediate_size=8, max_seq_len=4096
    )
    position_ids = torch.arange(0, 4096, 64, device=device)
    cos, sin = rope_angles(config, position_ids)  # [T, head_dim]
    frequencies = config.rope_theta ** -(torch.arange(0, 64, 2, device=device).double() / 64)
    angles = position_ids[:, None].double() * frequencies  # [T, head_dim / 2]
    torch.testing.assert_close(cos[:, :32].double(), angles.cos(), atol=1e-3, rtol=0)  # angles are in float32
    torch.testing.assert_close(sin[:, 32:].double(), angles.sin(), atol=1e-3, rtol=0)

    x = random(2, 2, 64, 64, device=device).to(dtype).requires_grad_()
    grad = random(2, 2, 64, 64, device=device, seed=1).to(dtype)
    y = apply_rope(x, cos, sin)
    turn = torch.complex(cos[:, :32].double(), sin[:, :32].double())

    def rotated(pairs: Tensor, turn: Tensor) -> Tensor:
        z = torch.complex(*pairs.detach().double().chunk(2, dim=-1)) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    assert y.dtype == dtype
    assert relative_error(y, rotated(x, turn)) < tolerance
    assert relative_error(torch.autograd.grad(y, x, grad)[0], rotated(grad, turn.conj())) < tolerance


# -------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(
    ("device", "head_dim", "compiled"),
    [
        ("cpu", 8, False),
        *(pytest.param("cuda", *case, marks=on_gpu) for case in ((64, False), (128, False), (20, False), (64, True))),
    ],
)
def test_packed_rows_attend_as_document_by_document(device: str, head_dim: int, compiled: bool) -> None:
    """As exactly as one call for each document, in one call where the kernel serves, and without cuDNN's plans."""
    in_one_call = device == "cuda" and head_dim != 20
    seq_len = 32 if device == "cpu" else 256
    exact = [random(2, n, seq_len, head_dim, device=device, seed=n).bfloat16() for n in (8, 2, 2, 8)]
    attend = torch.compile(lambda *x, within: within(*x)) if compiled else lambda *x, within: within(*x)
    eighth = seq_len // 8
    for rows in ([[seq_len]] * 2, [[3 * eighth, 3, 2 * eighth], [1, 5 * eighth, 7]], [[], [7] * (seq_len // 8)]):
        documents = Documents.of_rows(rows, seq_len)
        results = {}
        for name, dtype in (("expected", torch.float64), ("by document", torch.bfloat16), ("ours", torch.bfloat16)):
            *tensors, weights = (x.to(dtype).requires_grad_() for x in exact)
            with torch.profiler.profile() as profile:
                if name == "ours":
                    y = attend(*tensors, within=attention_within(documents, torch.device(device)))
                else:
                    y = packed_attention(*tensors, documents)
                results[name] = [y, *torch.autograd.grad((y * weights).sum(), tensors)]
        operations = {event.key for event in profile.key_averages()}
        assert ("torch_attn::_varlen_attn" in operations) == in_one_call
        assert not any("cudnn" in operation for operation in operations)
        for expected, by_document, ours in zip(*results.values(), strict=True):
            error, usual = ((x.double() - expected).abs().max().item() for x in (ours, by_document))
            assert error <= 4 * usual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_grouped_heads_never_hold_all_scores(device: str, dtype: torch.dtype) -> None:
    query, key, value = (random(1, heads, 256, 64, device=device).to(dtype) for heads in (4, 2, 2))
    expected = F.scaled_dot_product_attention(
        *(x.double() for x in (query, key, value)), is_causal=True, enable_gqa=True
    )
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        assert relative_error(causal_attention(query, key, value), expected) < 1e-2
