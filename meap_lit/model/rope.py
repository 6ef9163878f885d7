"""Rotary position embeddings (arXiv 2104.09864), in the half-split layout of Hugging Face checkpoints."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meap_lit.model.compiled import own
from meap_lit.model.config import DecoderConfig, RopeScaling


def rope_frequencies(config: DecoderConfig, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Return the inverse frequencies and the factor on cosine and sine (other than 1 only with YaRN).

    Returns:
        Angle per position of each pair of dimensions, [head_dim / 2], float32; and the factor.
    """
    pairs = torch.arange(0, config.head_width, 2, dtype=torch.float32, device=device)
    inv_freq = 1.0 / config.rope_theta ** (pairs / config.head_width)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq, 1.0
    if scaling.type == "linear":
        return inv_freq / scaling.factor, 1.0
    if scaling.type == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    factor = scaling.attention_factor
    return _yarn(inv_freq, scaling, config), 0.1 * math.log(scaling.factor) + 1.0 if factor is None else factor


def _llama3(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide long wavelengths by the factor, keep short ones, blend between (meta-llama, `apply_scaling`)."""
    wavelength = 2 * math.pi / inv_freq
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = (scaling.original_max_seq_len / wavelength - low) / (high - low)
    keep = keep.clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / scaling.factor


def _yarn(inv_freq: Tensor, scaling: RopeScaling, config: DecoderConfig) -> Tensor:
    """Blend by the number of turns a dimension makes within the old context (arXiv 2309.00071, section 3.2)."""
    width = config.head_width

    def dimension(turns: float) -> float:
        context_ratio = scaling.original_max_seq_len / (turns * 2 * math.pi)
        return width * math.log(context_ratio) / (2 * math.log(config.rope_theta))

    first = max(math.floor(dimension(scaling.beta_fast)), 0)
    last = min(math.ceil(dimension(scaling.beta_slow)), width - 1)
    index = torch.arange(width // 2, dtype=torch.float32, device=inv_freq.device)
    divide = ((index - first) / max(last - first, 0.001)).clamp(0, 1)
    return divide * inv_freq / scaling.factor + (1 - divide) * inv_freq


def rope_angles(config: DecoderConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position.

    Computed anew for each forward (cheap next to one matrix product), so the decoder holds no buffer that a
    meta-device start or a change of dtype could spoil.

    Args:
        position_ids: Positions, [T] or [B, T], int64.

    Returns:
        Cosine and sine, each [..., T, head_dim], float32.
    """
    inv_freq, factor = rope_frequencies(config, position_ids.device)
    angles = position_ids[..., None].float() * inv_freq  # [..., T, head_dim / 2]
    angles = torch.cat((angles, angles), dim=-1)  # [..., T, head_dim]
    return angles.cos() * factor, angles.sin() * factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads in `x`, [B, H, T, head_dim], by angles that broadcast to it; dtype is kept."""
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """Rotation whose gradient is the inverse rotation; autograd would split the halves and pad each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return own(_rotate(x, cos, sin, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: Literal[1, -1]) -> Tensor:
    half = x.size(-1) // 2
    first, second, sin = x[..., :half], x[..., half:], sin[..., :half]  # both halves of sin are the same
    y = x * cos  # in float32
    y[..., :half].addcmul_(second, sin, value=-direction)
    y[..., half:].addcmul_(first, sin, value=direction)
    return y.to(x.dtype)
