import pickle
from itertools import islice

import numpy as np
import pytest
import torch
from litdata.streaming import Cache, TokensLoader
from torch.utils.data import DataLoader

from meap_lit.data.stream.micro_batches import Slice, TrainStream, ValidationStream
from meap_lit.data.stream.order import MixedOrder, ShuffledOrder, Visit
from meap_lit.data.stream.text import BlockReader, TokenBlocks
from meap_lit.errors import UserError
from meap_lit.model import IGNORE_INDEX

SEQ_LEN = 7


def write_chunks(folder, num_blocks, first=0):
    """A dataset whose block number i holds the tokens first + 8 * i, ..., first + 8 * i + 7; 10 blocks a chunk."""
    cache = Cache(str(folder), chunk_bytes=10 * 8 * 2 + 16, item_loader=TokensLoader(block_size=SEQ_LEN + 1))
    for i in range(num_blocks):
        start = first + i * (SEQ_LEN + 1)
        cache._add_item(i, torch.arange(start, start + SEQ_LEN + 1).to(torch.uint16))
    cache.done()
    cache.merge()
    return str(folder)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    blocks = TokenBlocks(write_chunks(tmp_path_factory.mktemp("a"), 60), SEQ_LEN)
    assert len(blocks) == 60
    assert len(blocks.chunk_sizes) > 3
    return blocks


def train_stream(
    sources, *, rank=0, num_replicas=1, micro_batch_size=4, start=0, weights=None, seed=3, vocab_size=1000
):
    orders = [ShuffledOrder(source.chunk_sizes, (seed, number)) for number, source in enumerate(sources)]
    return TrainStream(
        MixedOrder(orders, weights or [1.0] * len(sources), seed),
        BlockReader(sources, SEQ_LEN, vocab_size),
        rank_slice=Slice(rank, num_replicas),
        global_batch_size=num_replicas * micro_batch_size,
        micro_batch_size=micro_batch_size,
        start=start,
    )


def rows(stream, num_workers=0):
    """Return the rows of a rank's slice of the first 96 samples."""
    num_batches = 96 // (stream.micro_batch_size * stream.rank_slice.num_replicas)
    batches = islice(DataLoader(stream, batch_size=None, num_workers=num_workers), num_batches)
    return [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]


def test_blocks_are_read_at_random(blocks):
    for index in (59, 0, 31, 30, 9, 10, 59):
        assert blocks[index].tolist() == list(range(index * 8, index * 8 + 8))


def test_labels_are_the_next_tokens(blocks):
    batch = next(iter(train_stream([blocks])))
    assert batch["input_ids"].shape == batch["labels"].shape == (4, SEQ_LEN)
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)
    assert all(tensor.is_contiguous() for tensor in batch.values())  # memory is pinned and copied to a GPU as one piece
    assert torch.equal(batch["sample_ids"], batch["input_ids"][:, 0] // 8)


def test_an_epoch_shows_every_block_once(blocks):
    first_epoch = rows(train_stream([blocks]))[:60]
    assert len(set(first_epoch)) == 60


@pytest.mark.parametrize(("num_replicas", "micro_batch_size"), [(1, 2), (2, 4), (2, 1), (4, 2)])
def test_every_step_holds_the_same_samples_on_any_number_of_devices(blocks, num_replicas, micro_batch_size):
    global_batch = 8
    expected = rows(train_stream([blocks], micro_batch_size=global_batch))
    ranks = [
        rows(train_stream([blocks], rank=rank, num_replicas=num_replicas, micro_batch_size=micro_batch_size))
        for rank in range(num_replicas)
    ]
    share = global_batch // num_replicas
    for step in range(96 // global_batch):
        step_rows = [row for rank in ranks for row in rank[step * share : (step + 1) * share]]
        assert sorted(step_rows) == sorted(expected[step * global_batch : (step + 1) * global_batch])


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_do_not_change_the_order(blocks, num_workers):
    assert rows(train_stream([blocks]), num_workers) == rows(train_stream([blocks]))


def test_a_later_start_goes_on_where_the_earlier_run_was(blocks):
    assert rows(train_stream([blocks], start=40))[:56] == rows(train_stream([blocks]))[40:]


def test_sources_are_mixed_and_told_apart(blocks, tmp_path):
    other = TokenBlocks(write_chunks(tmp_path, 20, first=480), SEQ_LEN)
    batches = list(islice(train_stream([blocks, other], weights=[1, 1]), 24))
    tokens = torch.cat([batch["input_ids"] for batch in batches])
    ids = torch.cat([batch["sample_ids"] for batch in batches])
    from_other = tokens[:, 0] >= 480
    assert 20 < int(from_other.sum()) < 76
    assert torch.equal(ids >> 32, from_other.long())


def validation_stream(blocks, rank=0, num_replicas=1, micro_batch_size=4, num_samples=23):
    return ValidationStream(
        [[Visit(0, sample, 0) for sample in range(num_samples)]],
        BlockReader([blocks], SEQ_LEN, vocab_size=1000),
        rank_slice=Slice(rank, num_replicas),
        micro_batch_size=micro_batch_size,
    )


@pytest.mark.parametrize(("num_replicas", "micro_batch_size"), [(1, 4), (2, 4), (4, 8), (3, 1)])
def test_validation_reads_each_row_once_and_fills_up_with_ignored_ones(blocks, num_replicas, micro_batch_size):
    streams = [validation_stream(blocks, rank, num_replicas, micro_batch_size) for rank in range(num_replicas)]
    batches = [list(stream) for stream in streams]
    assert len({len(of_rank) for of_rank in batches}) == 1, "ranks with unequally many batches would hang"
    flat = [batch for of_rank in batches for batch in of_rank]
    assert {len(batch["input_ids"]) for batch in flat} == {micro_batch_size}
    counted = [
        int(ids[0]) // 8
        for batch in flat
        for ids, labels in zip(batch["input_ids"], batch["labels"])
        if (labels != IGNORE_INDEX).all()
    ]
    ignored = sum(int((batch["labels"] == IGNORE_INDEX).all(dim=1).sum()) for batch in flat)
    assert sorted(counted) == list(range(23))
    assert ignored == len(flat) * micro_batch_size - 23


def test_a_token_outside_the_vocabulary_is_named(blocks):
    stream = train_stream([blocks], seed=0, micro_batch_size=60, vocab_size=479)
    with pytest.raises(UserError, match=r"holds token id 479, outside the model's vocabulary of 479"):
        next(iter(stream))


@pytest.mark.slow
def test_a_spawned_worker_reads_the_same(blocks):
    loader = DataLoader(train_stream([blocks]), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert np.array_equal(next(iter(loader))["input_ids"], next(iter(train_stream([blocks])))["input_ids"])


def test_a_stream_survives_pickling(blocks):
    """It is sent to the workers where processes are spawned."""
    stream = pickle.loads(pickle.dumps(train_stream([blocks])))
    assert np.array_equal(next(iter(stream))["input_ids"], next(iter(train_stream([blocks])))["input_ids"])
