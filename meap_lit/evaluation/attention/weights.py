"""Attention weights of a decoder while it reads a sequence, computed block by block.

The decoder computes its attention in one fused call that keeps no weights, and together they would not fit in memory:
51 GB in float32 for 24 layers of 32 heads over 4,096 tokens. So each layer passes on its queries and keys, and the
softmax is computed again, a block of queries at a time. The output of the decoder does not change.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from meap_lit.inference.generation import not_finite
from meap_lit.model import Decoder

Observe = Callable[[int, Tensor, Tensor], None]
"""Called with the number of a layer, its queries [H, T, head_dim] and keys [H_kv, T, head_dim], both rotated."""

PerHead = list[list[float]]
"""Values, [num_layers, num_heads]."""


@torch.no_grad()
def read(decoder: Decoder, input_ids: Tensor, observe: Observe) -> None:
    """Run the decoder on one sequence of ids, [T] int64 on its device, and call `observe` once for each layer."""
    hooks = [
        layer.register_forward_pre_hook(partial(_with_observer, number=number, observe=observe))
        for number, layer in enumerate(decoder.layers)
    ]
    try:
        decoder(input_ids[None])
    finally:
        for hook in hooks:
            hook.remove()


def _with_observer(layer: nn.Module, inputs: tuple[Any, ...], *, number: int, observe: Observe) -> tuple[Any, ...]:
    """Return the inputs of a block with an attention function that passes its arguments to `observe`."""
    *others, attend = inputs

    def observed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        observe(number, query[0], key[0])
        return attend(query, key, value)

    return (*others, observed)


def weight_blocks(query: Tensor, key: Tensor, block_size: int) -> Iterator[Tensor]:
    """Yield the attention weights of a sequence, `block_size` queries at a time.

    Args:
        query: Rotated queries of all positions, [H, T, head_dim].
        key: Rotated keys, [H_kv, T, head_dim].
        block_size: Queries at a time.

    Yields:
        Weights of n queries at the last n of S positions, [H, n, S]; S grows to T.
    """
    for start in range(0, query.size(1), block_size):
        stop = min(start + block_size, query.size(1))
        yield attention_weights(query[:, start:stop], key[:, :stop])


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """Return the causal softmax weights of n queries at the last n of S positions.

    Args:
        query: Rotated queries, [H, n, head_dim].
        key: Rotated keys, [H_kv, S, head_dim].

    Returns:
        Weights, [H, n, S], float32 (float64 for such inputs); rows sum to 1.
    """
    (num_kv_heads, num_keys, width), num_queries = key.shape, query.size(1)
    dtype = torch.promote_types(query.dtype, torch.float32)
    # query heads that share a key head are stacked as more queries of it, so that no key is copied
    stacked = query.to(dtype).unflatten(0, (num_kv_heads, -1)).flatten(1, 2)  # [H_kv, H / H_kv * n, head_dim]
    scores = (stacked / math.sqrt(width)) @ key.to(dtype).transpose(1, 2)  # [H_kv, H / H_kv * n, S]
    scores = scores.unflatten(1, (-1, num_queries)).flatten(0, 1)  # [H, n, S]
    return scores.masked_fill_(~visible(num_queries, num_keys, query.device), -math.inf).softmax(dim=-1)


def visible(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Return which of S keys each of n queries at the last n positions sees, [n, S], bool."""
    positions = torch.arange(num_keys, device=device)
    return positions <= positions[num_keys - num_queries :, None]


def as_record(values: Tensor) -> PerHead:
    """Return values, [num_layers, num_heads], as lists, rounded to six digits.

    Raises:
        UserError: If a value is not finite.
    """
    if not values.isfinite().all():
        raise not_finite()
    return [[float(f"{value:.6g}") for value in row] for row in values.tolist()]


def by_head(values: np.ndarray) -> dict[tuple[int, int], float]:
    """Return values, [num_layers, num_heads], by the numbers of head and layer, from 1."""
    return {(head + 1, layer + 1): float(value) for (layer, head), value in np.ndenumerate(values)}
