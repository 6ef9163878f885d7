from itertools import islice

import numpy as np
import pytest

from meap_lit.data.stream.order import MixedOrder, ShuffledOrder


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_every_epoch_visits_each_sample_once_in_another_order(window):
    order = ShuffledOrder([5, 0, 7, 3, 4], seed=(1, 0), window=window)
    epochs = [order.take(epoch * 19, epoch * 19 + 19).tolist() for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(19))
    assert len(set(map(tuple, [*epochs, range(19)]))) == 4


def test_samples_mix_within_a_window_of_chunks_only():
    order = ShuffledOrder([10] * 8, seed=(3, 0), window=2)
    epoch = order.take(0, 80)
    chunks_per_window = [set((part // 10).tolist()) for part in np.split(epoch, 4)]
    assert all(len(chunks) == 2 for chunks in chunks_per_window)
    assert sorted(chunk for chunks in chunks_per_window for chunk in chunks) == list(range(8))
    assert any(np.any(np.diff(part // 10) != 0) for part in np.split(epoch, 4)), "two chunks are really interleaved"


def test_any_position_can_be_looked_up_first():
    sizes = [3, 8, 2, 9]
    expected = ShuffledOrder(sizes, seed=(7, 1)).take(0, 60).tolist()
    back_and_forth = ShuffledOrder(sizes, seed=(7, 1))
    for start, stop in ((59, 60), (0, 1), (21, 22), (22, 50), (43, 44), (44, 45), (5, 5)):
        assert ShuffledOrder(sizes, seed=(7, 1)).take(start, stop).tolist() == expected[start:stop]
        assert back_and_forth.take(start, stop).tolist() == expected[start:stop]


def test_seed_and_source_decide_the_order():
    def first(seed):
        return ShuffledOrder([50] * 4, seed=seed).take(0, 50).tolist()

    assert first((1, 0)) == first((1, 0))
    assert first((1, 0)) != first((2, 0))
    assert first((1, 0)) != first((1, 1))


def mixed(weights, seed=5):
    return MixedOrder([ShuffledOrder([100], (seed, n)) for n in range(len(weights))], weights, seed)


def test_sources_are_mixed_by_weight():
    drawn = np.array([source for source, _, _ in islice(mixed([3, 1]).iterate(0), 20_000)])
    share = (drawn == 0).mean()
    assert 0.73 < share < 0.77  # 0.75 within five standard errors


def test_each_source_goes_through_its_own_order():
    samples = list(islice(mixed([3, 1]).iterate(0), 1000))
    for source in (0, 1):
        taken = [index for s, index, _ in samples if s == source]
        assert len(taken) > 100, "the source is repeated"
        assert taken == ShuffledOrder([100], (5, source)).take(0, len(taken)).tolist()
        assert [epoch for s, _, epoch in samples if s == source] == [i // 100 for i in range(len(taken))]


@pytest.mark.parametrize("start", [1, 999, 65_535, 65_536, 140_000])
def test_iteration_resumes_at_any_position(start):
    expected = list(islice(mixed([1, 2, 4]).iterate(0), start, start + 50))
    assert list(islice(mixed([1, 2, 4]).iterate(start), 50)) == expected


@pytest.mark.parametrize("bounds", [(0, 10), (65_530, 65_540), (3, 140_000)])
def test_neighboring_visits_are_those_of_the_iteration(bounds):
    start, stop = bounds
    columns = [column.tolist() for column in mixed([1, 2, 4]).visits(start, stop)]
    assert list(zip(*columns, strict=True)) == list(islice(mixed([1, 2, 4]).iterate(start), stop - start))


def test_samples_of_each_source_are_counted_up_to_any_position():
    drawn = np.array([source for source, _, _ in islice(mixed([1, 2, 4]).iterate(0), 140_000)])
    order = mixed([1, 2, 4])
    for end in (140_000, 0, 1, 65_536, 100_000, 7):
        assert order.count_by_source(end).tolist() == [int((drawn[:end] == source).sum()) for source in range(3)]


def test_the_order_never_changes_between_versions():
    """Also not in a later epoch or block, or for another seed than 0."""
    first = ShuffledOrder([4, 4, 4], seed=(0, 0), window=2).take(0, 12)
    assert first.tolist() == [1, 6, 5, 3, 4, 0, 7, 2, 8, 11, 9, 10]
    later = ShuffledOrder([4, 4, 4], seed=(7, 1), window=2).take(12, 24)
    assert later.tolist() == [11, 8, 9, 3, 2, 10, 1, 0, 5, 4, 6, 7]
    sources, samples, epochs = (column.tolist() for column in mixed([1, 2, 4]).visits(65_530, 65_542))
    assert sources == [2, 1, 2, 2, 0, 1, 2, 1, 2, 2, 2, 1]
    assert samples == [85, 58, 63, 53, 74, 40, 55, 83, 10, 11, 50, 91]
    assert epochs == [{0: 93, 1: 186, 2: 375}[source] for source in sources]
