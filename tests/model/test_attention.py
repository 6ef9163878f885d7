"""The three kinds of attention against softmax over a dense mask, written out."""

import math
import pickle

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from meap_lit.model import DecoderConfig, Documents, KVCache
from meap_lit.model import attention as attention_module
from meap_lit.model.attention import attention_within, causal_attention, packed_attention
from tests.support import varlen

HEAD_DIM = 8


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention by matrix products; `mask`, [B, T, S], is True where a query sees a key."""
    repeats = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) / math.sqrt(HEAD_DIM)
    return scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ value


def heads(batch_size: int, seq_len: int, num_heads: int = 4, num_kv_heads: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch_size, seq_len, count, HEAD_DIM, generator=generator, dtype=torch.float64)
        .transpose(1, 2)  # as the decoder's projections leave them
        .requires_grad_()
        for count in (num_heads, num_kv_heads, num_kv_heads)
    ]


# --------------------------------------------------------------------------------------------- packed documents


@pytest.mark.parametrize(
    ("rows", "seq_len", "expected"),
    [
        ([[5]], 5, (5,)),
        ([[3, 2]], 8, (3, 2, 3)),
        ([[4], [1, 2], [4]], 4, (4, 1, 2, 1, 4)),
        ([[], [2]], 2, (2, 2)),  # a row of padding only
    ],
)
def test_what_is_left_of_a_row_is_a_document(rows: list[list[int]], seq_len: int, expected: tuple[int, ...]) -> None:
    assert Documents.of_rows(rows, seq_len).lengths == expected


@pytest.mark.parametrize("row", [[3, 3], [0, 2], [6, -1]])
def test_documents_that_do_not_make_up_a_row_are_refused(row: list[int]) -> None:
    with pytest.raises(ValueError, match="do not make up a row of 5"):
        Documents.of_rows([[5], row], 5)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "rows",
    [
        [[12], [12]],
        [[1, 4, 2], [5, 7]],
        [[3, 3, 3], [3, 3, 1]],
        [[2, 10], [10, 2]],  # equal neighbors in different rows
        [[1] * 12, [12]],
    ],
)
def test_packed_is_a_dense_mask_of_blocks(rows: list[list[int]], num_kv_heads: int) -> None:
    tensors = heads(2, 12, num_kv_heads=num_kv_heads)
    document_ids = torch.full((2, 12), -1)  # padding shares one id and is a block as well
    for row, lengths in enumerate(rows):
        ids = [index for index, length in enumerate(lengths) for _ in range(length)]
        document_ids[row, : len(ids)] = torch.tensor(ids)
    mask = (document_ids[:, :, None] == document_ids[:, None, :]).tril()
    expected = dense(*tensors, mask)
    y = packed_attention(*tensors, documents=Documents.of_rows(rows, 12))
    assert y.shape == (2, 4, 12, HEAD_DIM)
    torch.testing.assert_close(y, expected)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((y * weights).sum(), tensors)
    for ours, theirs in zip(gradients, torch.autograd.grad((expected * weights).sum(), tensors), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_whole_rows_as_documents_are_plain_causal_attention() -> None:
    tensors = heads(3, 10)
    whole = packed_attention(*tensors, documents=Documents.of_rows([[10]] * 3, 10))
    assert torch.equal(whole, causal_attention(*tensors))
    torch.testing.assert_close(whole, dense(*tensors, torch.ones(3, 10, 10, dtype=torch.bool).tril()))


def test_scores_are_formed_within_documents_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal neighbors share a call, and calls have few lengths: kernels keep buffers for each."""
    shapes: list[tuple[int, int]] = []

    def recorded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shapes.append((query.size(0), query.size(2)))
        return causal_attention(query, key, value)

    monkeypatch.setattr(attention_module, "causal_attention", recorded)
    packed_attention(*heads(2, 180), documents=Documents.of_rows([[60, 60, 60], [60, 70]], 180))
    assert shapes == [(4, 64), (1, 128), (1, 64)]
    shapes.clear()
    packed_attention(*heads(2, 12), documents=Documents.of_rows([[12], [12]], 12))
    assert shapes == [(2, 12)], "documents of one length are not padded"


@pytest.mark.parametrize(
    ("head_dim", "dtype", "in_one_call"),
    [(8, torch.float32, True), (12, torch.float32, False), (200, torch.float32, False), (8, torch.float64, False)],
)
def test_what_the_kernel_cannot_serve_is_served_by_document(
    head_dim: int, dtype: torch.dtype, in_one_call: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen.enable(monkeypatch)
    tensors = [torch.randn(2, num_heads, 12, head_dim, dtype=dtype) for num_heads in (4, 2, 2)]
    documents = Documents.of_rows([[1, 4, 2], [5, 7]], 12)
    y = attention_within(documents, torch.device("cpu"))(*tensors)
    assert varlen.calls == ([[0, 1, 5, 7, 12, 17, 24]] if in_one_call else [])
    torch.testing.assert_close(y, packed_attention(*tensors, documents))


def test_documents_travel_with_their_batch() -> None:
    """To a device, through a precision plugin, pinned, pickled, and out of a worker process."""
    documents = Documents.of_rows([[3, 2], [5]], 6)
    batch = {"input_ids": torch.ones(2, 6), "documents": documents}
    travelled = {
        "device": move_data_to_device(batch, "meta"),
        "precision": HalfPrecision("bf16-true").convert_input(batch),
        "pinned": pin_memory({"documents": documents}),
        "pickled": pickle.loads(pickle.dumps(batch)),
        "worker": next(iter(DataLoader([batch], batch_size=None, num_workers=1))),
    }
    assert travelled["device"]["input_ids"].is_meta
    assert travelled["precision"]["input_ids"].dtype == torch.bfloat16
    for way, arrived in travelled.items():
        assert arrived["documents"].lengths == (3, 2, 1, 5, 1), way
        assert arrived["documents"] == documents, way


# -------------------------------------------------------------------------------------------------------- cache

CONFIG = DecoderConfig(num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=32, intermediate_size=8)


@pytest.mark.parametrize("first_positions", [None, torch.arange(6)])
@torch.no_grad()
def test_cached_is_causal_attention_over_all_that_was_stored(first_positions: Tensor | None) -> None:
    cache = KVCache(CONFIG, 2, 16, torch.device("cpu"), torch.float64)
    query, key, value = heads(2, 10)
    expected = dense(query, key, value, torch.ones(2, 10, 10, dtype=torch.bool).tril())
    pieces = [
        cache.attention(position_ids)[1](*(x[:, :, start:stop] for x in (query, key, value)))
        for start, stop, position_ids in (
            (0, 6, first_positions),
            (6, 7, torch.arange(6, 7)),
            (7, 10, torch.arange(7, 10).expand(2, 3)),
        )
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=2), expected)
    assert cache.keys[1].any()
    assert not cache.keys[0].any(), "each layer has slots of its own"


@torch.no_grad()
def test_what_padding_wrote_is_never_seen() -> None:
    """The first row has 3 tokens padded to 5, the second 5; both then go on at their own position."""
    cache = KVCache(CONFIG, 2, 8, torch.device("cpu"), torch.float64)
    query, key, value = heads(2, 5)
    for x in (query, key, value):
        x[0, :, 3:] = 1e6
    cache.attention(None)[0](query, key, value)
    for step in range(3):
        token = heads(2, 1, seed=step + 1)
        y = cache.attention(torch.tensor([[3 + step], [5 + step]]))[0](*token)
        key = torch.cat((key, token[1]), dim=2)
        value = torch.cat((value, token[2]), dim=2)
        seen = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
        mask = torch.cat((seen, torch.ones(2, step + 1, dtype=torch.bool)), dim=1)[:, None]
        torch.testing.assert_close(y, dense(token[0], key, value, mask))
