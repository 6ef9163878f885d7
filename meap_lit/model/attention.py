"""Which tokens attend to which: every earlier one, those of the same document, or those in a cache.

The decoder hands one of these to its layers as `attend(query, key, value) -> y`, with query [B, H, T, head_dim], key
and value [B, H_kv, T, head_dim] and y [B, H, T, head_dim]. All are `scaled_dot_product_attention` underneath.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from meap_lit.model.config import DecoderConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every token attends to itself and to all before it in its row."""
    grouped = query.size(1) != key.size(1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


# --------------------------------------------------------------------------------------------- packed documents


@dataclass  # not frozen: Lightning's precision plugins walk through a batch and refuse a frozen one
class Documents:
    """Runs of tokens that attend among themselves only, in a batch of packed rows.

    They are numbers on the host, because the shapes of the attention calls follow from them: held on a device, each
    forward would wait for it.

    Args:
        lengths: Tokens of each document, row by row as the batch [B, T] lies flattened; they sum to B * T and none
            crosses the end of a row.
    """

    lengths: tuple[int, ...]

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[int]], seq_len: int) -> "Documents":
        """From the lengths of each row's documents; what is left of `seq_len` is padding, a document of its own.

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
    """Every token attends to itself and to those before it in its document.

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


class KVCache:
    """Keys and values of the tokens read so far, for generation; to be used without grad mode.

    Slot j of a row holds position j, and a query at position p sees the slots up to p. So prompts of unequal length
    are padded on the right and need no care: what padding wrote at position p is overwritten by the token that comes
    to stand there, before any query sees it.

    Args:
        config: The decoder's configuration.
        batch_size: Rows B.
        max_len: Positions of a row, all allocated now.
        device: Where the decoder is.
        dtype: Of keys and values; the decoder's own.
    """

    def __init__(
        self, config: DecoderConfig, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_len, config.head_width)
        # zeros, not empty: an unseen value has weight 0, and 0 times a stray NaN is NaN
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.num_groups = config.num_heads // config.num_kv_heads

    def attention(self, position_ids: Tensor | None, documents: Documents | None = None) -> list[Attend]:
        """For each layer the function that stores the keys and values of tokens and attends to what they may see.

        Args:
            position_ids: Positions of the tokens, [T] or [B, T], int64, below `max_len`. None for 0 to T-1, as a
                prompt is read: all that its tokens see is in the call, which is then plain causal attention.
            documents: For tokens that lie one row after the other without padding, as [1, T]: the tokens of each row.
                A row that does not begin at position 0 has those before in common with the row above it, from which
                it takes their keys and values.
        """
        if documents is not None:
            assert position_ids is not None, "where a document begins says what it has in common"
            firsts = [0, *accumulate(documents.lengths[:-1])]
            starts = position_ids.flatten()[firsts].tolist()
            assert len(starts) == self.keys.size(1), "a document for each row"
            assert starts[0] == 0, "there is no row above the first"
            return [
                partial(_fill_rows, cache=cache, starts=starts, lengths=documents.lengths)
                for cache in zip(self.keys, self.values, strict=True)
            ]
        if position_ids is None:
            return [partial(_fill, cache=cache) for cache in zip(self.keys, self.values, strict=True)]
        num_slots = int(position_ids.max()) + 1  # what lies behind the longest row so far, no query sees
        slots = position_ids.expand(self.keys.size(1), -1)[:, None, :, None]  # [B, 1, T, 1]
        unseen = slots < torch.arange(num_slots, device=position_ids.device)  # [B, 1, T, S]
        # The mask of all layers: added to the scores, not bool, which SDPA would turn into this in every layer. Query
        # heads that share a key head stand in it one after the other, see `_biased_attention`.
        bias = torch.zeros(unseen.shape, device=unseen.device, dtype=self.keys.dtype).masked_fill_(unseen, -math.inf)
        bias = bias.repeat(1, 1, self.num_groups, 1)  # [B, 1, H / H_kv * T, S]
        return [
            partial(_extend, cache=(keys[:, :, :num_slots], values[:, :, :num_slots]), slots=slots, bias=bias)
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def keep(self, rows: Tensor) -> None:
        """Give up all rows but these, [N] int64."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


def _fill(query: Tensor, key: Tensor, value: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
    for stored, new in zip(cache, (key, value), strict=True):
        stored[:, :, : new.size(2)] = new
    return causal_attention(query, key, value)


def _fill_rows(
    query: Tensor, key: Tensor, value: Tensor, cache: tuple[Tensor, Tensor], starts: list[int], lengths: tuple[int, ...]
) -> Tensor:
    rows = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = []
    for row, (start, (row_query, *row_cache)) in enumerate(zip(starts, rows, strict=True)):
        stop = start + row_query.size(2)
        for stored, new in zip(cache, row_cache, strict=True):
            if start:
                stored[row, :, :start] = stored[row - 1, :, :start]
            stored[row, :, start:stop] = new[0]
        if start:
            row_cache = [stored[row : row + 1, :, :stop] for stored in cache]
        outputs.append(_causal_end(row_query, *row_cache))
    return torch.cat(outputs, dim=2)


def _causal_end(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of the last T of S tokens: query [1, H, T, head_dim], key and value [1, H_kv, S, head_dim]."""
    start = key.size(2) - query.size(2)
    if start == 0:
        return causal_attention(query, key, value)
    groups = query.size(1) // key.size(1)
    outputs = []
    # is_causal would align the first query with the first key; a mask of all queries would be as large as T * S
    for block in query.split(_BLOCK_SIZE, dim=2):
        stop = start + block.size(2)
        bias = torch.full((block.size(2), stop), -math.inf, device=key.device, dtype=key.dtype).triu_(start + 1)
        outputs.append(_biased_attention(block, key[:, :, :stop], value[:, :, :stop], bias.repeat(groups, 1)))
        start = stop
    return torch.cat(outputs, dim=2)


_BLOCK_SIZE = 256  # queries that share a mask; 128 to 512 are about as fast on a CPU


def _extend(
    query: Tensor, key: Tensor, value: Tensor, cache: tuple[Tensor, Tensor], slots: Tensor, bias: Tensor
) -> Tensor:
    for stored, new in zip(cache, (key, value), strict=True):  # [B, H_kv, S, head_dim] and [B, H_kv, T, head_dim]
        stored.scatter_(2, slots.expand_as(new), new.to(stored.dtype))
    return _biased_attention(query, *cache, bias)


def _biased_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    # Query heads that share a key head are stacked as further queries of it: with a mask, SDPA's fused kernels do not
    # group heads on every device, and its fallback copies the whole cache for each query head.
    groups = query.size(1) // key.size(1), query.size(2)
    query = query.unflatten(1, (-1, groups[0])).flatten(2, 3)  # [B, H_kv, H / H_kv * T, head_dim]
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return y.unflatten(2, groups).flatten(1, 2)  # [B, H, T, head_dim]
