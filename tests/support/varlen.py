"""Kernels of torch's attention for variable lengths on a CPU, by softmax over one document at a time."""

import math
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from meap_lit.model import attention

calls: list[list[int]] = []
"""The bounds of each forward call."""


def enable(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> None:
    """Let packed rows on a CPU, in this dtype, take the path of a GPU in bfloat16."""
    _register()
    calls.clear()
    monkeypatch.setattr(attention, "_has_flash_attention", lambda device: True)
    monkeypatch.setattr(attention, "_FLASH_DTYPES", {dtype})


@cache
def _register() -> None:
    varlen._varlen_attn.register_kernel("cpu", _forward)
    varlen._varlen_attn_backward.register_kernel("cpu", _backward)


def _documents(bounds: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield the place of each document and its query, key, value and scores; heads come first, [H, n, ...]."""
    assert bounds.dtype == torch.int32
    groups = query.size(1) // key.size(1)
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:]):
        place = slice(start, stop)
        q, k, v = (x[place].transpose(0, 1).float() for x in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = q @ k.mT / math.sqrt(q.size(-1))
        unseen = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        yield place, [q, k, v, scores.masked_fill(unseen, -math.inf)]


@torch.autocast("cpu", enabled=False)
def _forward(query, key, value, bounds, key_bounds, max_q, max_k, is_causal, scale, window_size, *rest):
    assert is_causal
    assert torch.equal(bounds, key_bounds)
    assert bounds.diff().max() <= max_q == max_k
    calls.append(bounds.tolist())
    out = torch.full_like(query, math.nan)  # what is left out would be seen
    lse = torch.full((query.size(1), query.size(0)), math.nan)  # [H, B * T]
    for place, (_, _, v, scores) in _documents(bounds, query, key, value):
        out[place] = (scores.softmax(-1) @ v).transpose(0, 1)
        lse[:, place] = scores.logsumexp(-1)
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def _backward(grad, query, key, value, out, lse, bounds, key_bounds, max_q, max_k, is_causal, rng, scale, window_size):
    grads = [torch.full_like(x, math.nan) for x in (query, key, value)]
    for place, (q, k, v, scores) in _documents(bounds, query, key, value):
        dy, y = (x[place].transpose(0, 1).float() for x in (grad, out))
        weights = (scores - lse[:, place, None]).exp()
        of_scores = weights * (dy @ v.mT - (dy * y).sum(-1, keepdim=True)) / math.sqrt(q.size(-1))
        of_heads = of_scores @ k, of_scores.mT @ q, weights.mT @ dy
        for whole, part in zip(grads, of_heads, strict=True):
            whole[place] = part.unflatten(0, (whole.size(1), -1)).sum(1).transpose(0, 1)
    return tuple(grads)
