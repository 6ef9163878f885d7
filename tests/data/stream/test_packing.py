from itertools import islice, pairwise

import numpy as np
import pytest

from meap_lit.data.store.chunks import ChatIndex
from meap_lit.data.stream.order import MixedOrder, ShuffledOrder, Visit
from meap_lit.data.stream.packing import PackedOrder, Sizes, pack, pack_rows
from meap_lit.masking.duplication import Duplication


def alpaca_like(count, seed=0):
    """Lengths spread as those of instruction data: a long tail over a median of about 130 tokens."""
    return np.random.default_rng(seed).lognormal(4.9, 0.6, count).clip(20, 1000).astype(np.int32)


def index_of(num_tokens, chunk=1000):
    """Samples of one answer each, half of the sample less the token that closes it."""
    count = len(num_tokens)
    chunk_sizes = [min(chunk, count - start) for start in range(0, count, chunk)]
    answer = np.asarray(num_tokens) // 2 - 1
    answer_tokens = np.stack([answer, np.ones_like(answer)], axis=1)
    return ChatIndex(np.asarray(num_tokens), np.ones(count, dtype=int), answer_tokens, chunk_sizes)


def order_of(index, duplication, seq_len=2048, seed=0, window=16_384):
    samples = MixedOrder([ShuffledOrder(index.chunk_sizes, (seed, 0))], [1.0], seed)
    sizes = [Sizes.of(index, duplication, seq_len)]
    return PackedOrder(samples, sizes, seq_len=seq_len, layout=duplication.layout, seed=seed, window=window)


# -------------------------------------------------------------------------------------------------- one window


def test_packing_by_hand():
    assert pack([5, 3, 6, 2, 4], capacity=8) == [[2, 3], [0, 1], [4]]
    # 3 fits into the rows with 4 and with 3 left: the fullest takes it
    assert pack([5, 4, 3], capacity=8) == [[0, 2], [1]]
    assert pack([8, 8], capacity=8) == [[0], [1]]
    assert pack([], capacity=8) == []


@pytest.mark.parametrize("capacity", [1000, 1777, 4096])
def test_every_document_is_packed_once_into_rows_that_hold_it(capacity):
    lengths = alpaca_like(3000).tolist()
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(3000))
    assert max(sum(lengths[index] for index in row) for row in rows) <= capacity


def fullest_fit(lengths, capacity):
    """Rows of the textbook's best-fit decreasing, found by looking at every row."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        open_rows = [row for row in rows if sum(row) + length <= capacity]
        if open_rows:
            max(open_rows, key=sum).append(length)
        else:
            rows.append([length])
    return rows


def test_packing_is_best_fit_decreasing():
    lengths = alpaca_like(400, seed=1).tolist()
    ours = [[lengths[index] for index in row] for row in pack(lengths, 1024)]
    assert sorted(map(sum, ours)) == sorted(map(sum, fullest_fit(lengths, 1024)))


@pytest.mark.parametrize("layout", ["concat", "separate"])
def test_rows_are_nearly_all_real_tokens(layout):
    index = index_of(alpaca_like(5000))
    order = order_of(index, Duplication(layout=layout))
    rows = list(islice(order.iterate(0), order.num_rows(1)))
    assert sum(row.num_tokens for row in rows) / (len(rows) * 2048) > 0.95


# ------------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize("layout", ["concat", "separate"])
def test_what_a_row_counts_by_hand(layout):
    # answers of 60, 20 and 51 tokens with one closing token each; the second is too short for a copy
    index = ChatIndex(np.array([100, 40, 80]), np.array([1, 1, 1]), np.array([[60, 1], [20, 1], [51, 1]]), [3])
    duplication = Duplication(layout=layout)
    sizes = Sizes.of(index, duplication, 400)
    assert sizes.num_masked.tolist() == [6, 0, 5]
    assert sizes.num_supervised.tolist() == [61, 21, 52]
    (row,) = pack_rows([Visit(0, index, 0) for index in range(3)], [sizes], 400, layout)
    assert row.num_tokens == 2 * 100 + 40 + 2 * 80
    assert row.num_labels == 61 + 21 + 52 + 6 + 5
    assert row.num_masked == 11
    assert row.num_copies == 2
    assert len(row.documents) == (3 if layout == "concat" else 5)


def test_samples_of_several_answers_are_summed():
    index = ChatIndex(
        np.array([300, 10]), np.array([3, 1]), np.array([[60, 1], [20, 1], [100, 0], [5, 1]]), chunk_sizes=[2]
    )
    sizes = Sizes.of(index, Duplication(), 1000)
    assert sizes.num_masked.tolist() == [6 + 10, 0]
    assert sizes.num_supervised.tolist() == [182, 6]


def test_a_sample_that_does_not_fit_twice_has_no_copy_in_concat_only():
    index = index_of([400, 600])
    assert Sizes.of(index, Duplication(layout="concat"), 1000).without_room.tolist() == [False, True]
    assert Sizes.of(index, Duplication(layout="concat"), 1000).num_masked.tolist() == [19, 0]
    assert Sizes.of(index, Duplication(layout="separate"), 1000).num_masked.tolist() == [19, 29]


# -------------------------------------------------------------------------------------------------- many windows


@pytest.mark.parametrize("window", [100, 333, 16_384])
def test_an_epoch_holds_every_sample_once(window):
    order = order_of(index_of(alpaca_like(1000)), Duplication(mask_ratio=0), window=window)
    ends = [order.num_rows(epoch) for epoch in range(4)]
    rows = list(islice(order.iterate(0), ends[-1]))
    orders = []
    for epoch, (start, end) in enumerate(pairwise(ends)):
        visits = [document.visit for row in rows[start:end] for document in row.documents]
        assert sorted(visits) == [Visit(0, index, epoch) for index in range(1000)]
        orders.append([visit.sample for visit in visits])
    assert len(set(map(tuple, orders))) == len(orders)


def test_the_rows_never_change_between_versions():
    index = index_of(np.array([300, 500, 700, 200, 400, 600, 100, 900, 50, 350]), chunk=4)
    rows = islice(order_of(index, Duplication(mask_ratio=0), seq_len=1000, seed=7).iterate(0), 8)
    assert [[document.visit.sample for document in row.documents] for row in rows] == [
        *([2, 0], [3], [7, 6], [5, 4], [1, 9, 8]),
        *([3], [5, 4], [7, 6]),
    ]


@pytest.mark.parametrize("start", [1, 13, 200])
def test_rows_go_on_at_any_place(start):
    def order():
        return order_of(index_of(alpaca_like(800)), Duplication(), window=250)

    assert list(islice(order().iterate(start), 40)) == list(islice(order().iterate(0), start, start + 40))


@pytest.mark.parametrize("layout", ["concat", "separate"])
def test_tokens_of_each_source_are_counted_up_to_any_row(layout):
    indexes = [index_of(alpaca_like(200, seed=seed)) for seed in (0, 1)]
    sources = [ShuffledOrder(index.chunk_sizes, (0, number)) for number, index in enumerate(indexes)]
    duplication = Duplication(layout=layout)
    sizes = [Sizes.of(index, duplication, 2048) for index in indexes]

    def order():
        samples = MixedOrder(sources, [3, 1], seed=0)
        return PackedOrder(samples, sizes, seq_len=2048, layout=layout, seed=0, window=130)

    tokens, expected = np.zeros(2, dtype=int), [[0, 0]]
    for row in islice(order().iterate(0), 150):
        for (source, sample, _), has_original, has_copy in row.documents:
            tokens[source] += int(indexes[source].num_tokens[sample]) * (has_original + has_copy)
        expected.append(tokens.tolist())
        assert sum(expected[-1]) - sum(expected[-2]) == row.num_tokens
    assert order().num_rows(1) < 150, "another epoch was begun"
    ours = order()
    for end in (150, 0, 1, 40, 41, 149, 60):
        assert ours.count_by_source(end).tolist() == order().count_by_source(end).tolist() == expected[end]


def test_long_rows_are_not_all_at_the_front():
    order = order_of(index_of(alpaca_like(4000)), Duplication(mask_ratio=0))
    counts = [len(row.documents) for row in islice(order.iterate(0), order.num_rows(1))]
    halves = np.array_split(counts, 2)
    assert abs(np.mean(halves[0]) - np.mean(halves[1])) < 0.2 * np.mean(counts)
