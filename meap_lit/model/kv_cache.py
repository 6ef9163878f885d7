"""Keys and values of earlier tokens, for generation."""

import math
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from meap_lit.model.attention import Attend, Documents, causal_attention
from meap_lit.model.config import DecoderConfig


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
            documents: For tokens of all rows, one row after the other without padding, [1, T]: the tokens of each row.
                A row that does not begin at position 0 has those before in common with the row above it, from which
                it takes their keys and values.
        """
        if documents is not None:
            assert position_ids is not None, "the first position of a row tells what it shares with the row above"
            firsts = [0, *accumulate(documents.lengths[:-1])]
            starts = position_ids.flatten()[firsts].tolist()
            assert len(starts) == self.keys.size(1), "a document for each row"
            assert starts[0] == 0, "the first row has no row above it"
            return [
                partial(_fill_rows, cache=cache, starts=starts, lengths=documents.lengths)
                for cache in zip(self.keys, self.values, strict=True)
            ]
        if position_ids is None:
            return [partial(_fill, cache=cache) for cache in zip(self.keys, self.values, strict=True)]
        num_slots = int(position_ids.max()) + 1  # no query attends to slots after the longest row so far
        slots = position_ids.expand(self.keys.size(1), -1)  # [B, T]
        unseen = slots[:, None, :, None] < torch.arange(num_slots, device=position_ids.device)  # [B, 1, T, S]
        # The mask of all layers: added to the scores, not bool, which SDPA would turn into this in every layer. Query
        # heads that share a key head stand in it one after the other, see `_biased_attention`.
        bias = torch.zeros(unseen.shape, device=unseen.device, dtype=self.keys.dtype).masked_fill_(unseen, -math.inf)
        bias = bias.repeat(1, 1, self.num_groups, 1)  # [B, 1, H / H_kv * T, S]
        rows = torch.arange(self.keys.size(1), device=slots.device)[:, None]  # [B, 1]
        return [
            partial(
                _extend, cache=(keys[:, :, :num_slots], values[:, :, :num_slots]), rows=rows, slots=slots, bias=bias
            )
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, [N] int64."""
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
    query: Tensor, key: Tensor, value: Tensor, cache: tuple[Tensor, Tensor], rows: Tensor, slots: Tensor, bias: Tensor
) -> Tensor:
    for stored, new in zip(cache, (key, value), strict=True):  # [B, H_kv, S, head_dim] and [B, H_kv, T, head_dim]
        # `scatter_` would need as long as the whole cache is large (benchmarks/log.md)
        stored[rows, :, slots] = new.transpose(1, 2).to(stored.dtype)  # [B, T, H_kv, head_dim]
    return _biased_attention(query, *cache, bias)


def _biased_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    # Query heads that share a key head are stacked as further queries of it: with a mask, SDPA's fused kernels do not
    # group heads on every device, and its fallback copies the whole cache for each query head.
    groups = query.size(1) // key.size(1), query.size(2)
    query = query.unflatten(1, (-1, groups[0])).flatten(2, 3)  # [B, H_kv, H / H_kv * T, head_dim]
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return y.unflatten(2, groups).flatten(1, 2)  # [B, H, T, head_dim]
