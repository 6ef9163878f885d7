"""Attention functions: to all earlier tokens, to those of the same document, or to those in a cache.

The decoder hands one of these to its layers as `attend(query, key, value) -> y`, with query [B, H, T, head_dim], key
and value [B, H_kv, T, head_dim] and y [B, H, T, head_dim]. All are `scaled_dot_product_attention` underneath.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend from every token to itself and to all earlier tokens of its row."""
    grouped = query.size(1) != key.size(1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


# --------------------------------------------------------------------------------------------- packed documents


@dataclass  # not frozen: Lightning's precision plugins walk through a batch and refuse a frozen one
class Documents:
    """The documents of a batch of packed rows: runs of tokens that attend only to each other.

    The lengths are numbers on the host, because the shapes of the attention calls follow from them; if they were on a
    device, each forward would wait for it.

    Args:
        lengths: Tokens of each document, row by row in the flattened batch [B, T]; they sum to B * T and none
            crosses the end of a row.
    """

    lengths: tuple[int, ...]

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[int]], seq_len: int) -> "Documents":
        """Build from the lengths of each row's documents; the rest of `seq_len` is padding, a document of its own.

        Raises:
            ValueError: If a document has no token, or a row more than `seq_len`.
        """
        lengths: list[int] = []
        for row in rows:
            padding = seq_len - sum(row)
            if padding < 0 or min(row, default=1) < 1:
                raise ValueError(f"documents of {list(row)} tokens do not make up a row of {seq_len}")
            lengths += [*row, padding] if padding else row
        return cls(tuple(lengths))


@torch.compiler.disable  # lengths differ from batch to batch, and each new set would be compiled anew
def packed_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """Attend from every token to itself and to the earlier tokens of its document.

    One causal call for each document, or for a run of equally long ones: exact on every device and in every dtype,
    scores only where they count (the sum of n_i^2), nothing but ordinary PyTorch. The price is many small launches
    where documents are short; a kernel for variable lengths (FlashAttention, FlexAttention) needs one. That
    difference has not been measured on a GPU yet.
    """
    batch_shape = query.size(0), query.size(2)
    runs = [(length, len(list(run))) for length, run in groupby(documents.lengths)]
    # `split` and not slices: in the backward each slice would fill a tensor as large as the whole
    pieces = [_as_rows(x).split([length * count for length, count in runs]) for x in (query, key, value)]
    outputs = [
        _as_rows(causal_attention(*(_as_heads(piece, count, length) for piece in run)))
        for (length, count), run in zip(runs, zip(*pieces, strict=True), strict=True)
    ]
    return _as_heads(torch.cat(outputs), *batch_shape)


def _as_rows(x: Tensor) -> Tensor:
    """[B, H, T, head_dim] as [B * T, H, head_dim]."""
    return x.transpose(1, 2).flatten(0, 1)


def _as_heads(x: Tensor, batch_size: int, seq_len: int) -> Tensor:
    """[B * T, H, head_dim] as [B, H, T, head_dim]."""
    return x.unflatten(0, (batch_size, seq_len)).transpose(1, 2)


# -------------------------------------------------------------------------------------------------------- cache
