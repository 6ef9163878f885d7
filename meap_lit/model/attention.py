"""Attention functions: to all earlier tokens, to those of the same document, or to those in a cache.

The decoder hands one of these to its layers as `attend(query, key, value) -> y`, with query [B, H, T, head_dim], key
and value [B, H_kv, T, head_dim] and y [B, H, T, head_dim]. All are `scaled_dot_product_attention` underneath, except
for packed rows on a GPU, which take one call of FlashAttention for variable lengths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend from every token to itself and to all earlier tokens of its row."""
    grouped = query.size(1) != key.size(1)
    if grouped and query.dtype == torch.float32 and query.device.type == "cuda":
        # there only FlashAttention takes groups, and it takes no float32; what is left would hold all scores [T, T]
        key, value = (x.repeat_interleave(query.size(1) // key.size(1), dim=1) for x in (key, value))
        grouped = False
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


def attention_within(documents: Documents, device: torch.device) -> Attend:
    """Return the attention within documents, for all layers of one forward on `device`."""
    if not _has_flash_attention(device):
        return partial(packed_attention, documents=documents)
    # pinned, so that the copy does not make the host wait
    bounds = torch.tensor([0, *accumulate(documents.lengths)], dtype=torch.int32, pin_memory=device.type == "cuda")
    bounds = bounds.to(device, non_blocking=True)  # [N + 1]
    # One graph for every number of documents. A fixed number with empty documents at its end would cost memory: the
    # backward holds 128 rows in float32 for each, also for an empty one.
    torch._dynamo.mark_dynamic(bounds, 0)
    return partial(_varlen_attention, documents=documents, bounds=bounds)


def _has_flash_attention(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


_FLASH_DTYPES = {torch.float16, torch.bfloat16}
_MAX_FLASH_HEAD_DIM = 192  # above, some GPUs have no backward
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""Allows fewer key-value heads; torch 2.11 allows them without being asked."""


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents, bounds: Tensor) -> Tensor:
    """`packed_attention` in one call, which is compiled with what is around it.

    Args:
        query: [B, H, T, head_dim].
        key: [B, H_kv, T, head_dim].
        value: [B, H_kv, T, head_dim].
        documents: Read only where the kernel cannot serve.
        bounds: The first token of each document in the flattened batch, and the end of the last, [N + 1], int32.
    """
    batch_size, _, seq_len, head_dim = query.shape
    if query.dtype not in _FLASH_DTYPES or head_dim % 8 or head_dim > _MAX_FLASH_HEAD_DIM:
        return packed_attention(query, key, value, documents)
    query, key, value = _as_rows(query), _as_rows(key), _as_rows(value)
    # no document is longer than a row; the longest would be another number in every batch
    y = varlen_attn(query, key, value, bounds, bounds, seq_len, seq_len, window_size=(-1, 0), **_GROUPED)
    assert isinstance(y, Tensor), "nothing but the output was asked for"
    return _as_heads(y, batch_size, seq_len)


@torch.compiler.disable  # lengths differ from batch to batch, and each new set would be compiled anew
def packed_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """Attend from every token to itself and to the earlier tokens of its document.

    One causal call for each document, or for a run of equally long ones: exact on every device and in every dtype,
    scores only where they count (the sum of n_i^2), nothing but ordinary PyTorch. The price is many small calls where
    documents are short.

    Documents are padded to multiples of `_LENGTH_STEP` tokens at their end, which earlier tokens do not attend to.
    Without this, almost every document has a length of its own. Kernels on a CPU keep code and buffers for each shape,
    and blocks of many sizes fragment the memory: a run grew by 80 MB in each step (benchmarks/log.md).
    """
    batch_shape = query.size(0), query.size(2)
    runs = [(length, len(list(run))) for length, run in groupby(documents.lengths)]
    # `split` and not slices: in the backward each slice would fill a tensor as large as the whole
    pieces = [_as_rows(x).split([length * count for length, count in runs]) for x in (query, key, value)]
    with sdpa_kernel(_WITHOUT_PLANS):
        outputs = []
        for (length, count), run in zip(runs, zip(*pieces, strict=True), strict=True):
            # of the last two dimensions, from the last one on
            padding = (0, 0, 0, -length % _LENGTH_STEP if len(runs) > 1 else 0)
            y = causal_attention(*(F.pad(_as_heads(piece, count, length), padding) for piece in run))
            outputs.append(_as_rows(y[:, :, :length]))
    return _as_heads(torch.cat(outputs), *batch_shape)


_LENGTH_STEP = 64

_WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN, which torch prefers on Hopper and which plans anew for every shape, tens of milliseconds each."""


def _as_rows(x: Tensor) -> Tensor:
    """[B, H, T, head_dim] as [B * T, H, head_dim]."""
    return x.transpose(1, 2).flatten(0, 1)


def _as_heads(x: Tensor, batch_size: int, seq_len: int) -> Tensor:
    """[B * T, H, head_dim] as [B, H, T, head_dim]."""
    return x.unflatten(0, (batch_size, seq_len)).transpose(1, 2)


# -------------------------------------------------------------------------------------------------------- cache
