"""Micro-batches of token blocks, read from LitData chunks in an order that does not depend on the devices."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import NotRequired, TypedDict, TypeVar

import torch
from litdata import StreamingDataset, TokensLoader
from litdata.streaming.sampler import ChunkedIndex
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from meap_lit.data.store.cache import open_chunks
from meap_lit.data.store.remote import Storage
from meap_lit.data.stream.order import MixedOrder, ShuffledOrder, Visit
from meap_lit.errors import UserError
from meap_lit.model.loss import IGNORE_INDEX


class Batch(TypedDict):
    """Rows of text; tensors are int64.

    Args:
        input_ids: Token ids, [B, T].
        labels: Target of each position, [B, T].
        sample_ids: Global index of each row's sample, [B].
        source: In validation, the number of the dataset that the rows are of.
    """

    input_ids: Tensor
    labels: Tensor
    sample_ids: Tensor
    source: NotRequired[int]


T = TypeVar("T")

_DEFAULT = Storage()


class TokenBlocks:
    """Random access to the blocks of seq_len + 1 tokens of one prepared dataset.

    Neighbouring blocks share no token and never cross a chunk; LitData drops a chunk's last, incomplete block.

    Args:
        path: Folder or s3:// address of one split.
        seq_len: Tokens that a model reads at once; a block holds one more, for the last label.
        storage: How a remote dataset is read.
    """

    def __init__(self, path: str, seq_len: int, storage: Storage = _DEFAULT) -> None:
        self.path = path
        self.seq_len = seq_len
        self._chunks = open_chunks(path, storage)
        self._dataset = StreamingDataset(
            self._chunks.folder, item_loader=TokensLoader(block_size=seq_len + 1), shuffle=False
        )
        len(self._dataset)  # reads the index
        assert self._dataset.shuffler is not None
        intervals = self._dataset.shuffler.cache.get_chunk_intervals()
        self.chunk_sizes = [last - first for first, _, _, last in intervals]  # blocks in each chunk
        self._ends = [last for _, _, _, last in intervals]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Tensor:
        """Block number `index`, [T + 1], int64."""
        chunk = bisect.bisect_right(self._ends, index)  # LitData's own look-up walks over all chunks
        self._chunks.ensure(chunk)
        return self._dataset[ChunkedIndex(index=index, chunk_index=chunk)].long()


@dataclass(frozen=True)
class Shard:
    """The part of every global batch that one data-parallel rank reads."""

    rank: int = 0
    num_replicas: int = 1


class TrainStream(IterableDataset):
    """One rank's micro-batches of a run, epoch after epoch without a seam or an end.

    Args:
        sources: Datasets that are mixed.
        weights: Share of samples of each.
        seed: Seed of the order.
        shard: This rank's part.
        micro_batch_size: Rows of a micro-batch.
        start: Samples that the run, all ranks together, has seen already.
        vocab_size: Token ids must be below it.
    """

    def __init__(
        self,
        sources: Sequence[TokenBlocks],
        weights: Sequence[float],
        *,
        seed: int,
        shard: Shard,
        micro_batch_size: int,
        start: int,
        vocab_size: int,
    ) -> None:
        self.sources = sources
        orders = [ShuffledOrder(source.chunk_sizes, (seed, number)) for number, source in enumerate(sources)]
        self.order = MixedOrder(orders, weights, seed)
        self.shard = shard
        self.micro_batch_size = micro_batch_size
        self.start = start
        self.vocab_size = vocab_size

    def __iter__(self) -> Iterator[Batch]:
        worker, num_workers = worker_number()
        samples = self.order.iterate(self.start)
        rows_of_all_ranks = self.micro_batch_size * self.shard.num_replicas
        for number in count():
            rows = list(islice(samples, rows_of_all_ranks))
            if number % num_workers == worker:  # the loader takes from its workers in turn: the order is kept
                first = self.shard.rank * self.micro_batch_size
                yield self._read(rows[first : first + self.micro_batch_size])

    def _read(self, rows: Sequence[Visit]) -> Batch:
        tokens = torch.stack([self.sources[source][index] for source, index, _ in rows])  # [B, T + 1]
        check_vocabulary(tokens, self.vocab_size, self.sources[rows[0].source].path)
        sample_ids = torch.tensor([(source << 32) + index for source, index, _ in rows])
        return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "sample_ids": sample_ids}


class ValidationStream(IterableDataset):
    """The first blocks of the validation splits, once, in their own order; a batch is of one split.

    Every rank gets equally many batches of equal size: rows past the end are filled up with a block whose labels are
    all ignored, so that no rank waits for another and the figure does not depend on the number of ranks.

    Args:
        sources: Validation splits, read one after the other.
        counts: Rows of each.
        shard: This rank's part.
        micro_batch_size: Rows of a batch.
        vocab_size: Token ids must be below it.
    """

    def __init__(
        self,
        sources: Sequence[TokenBlocks],
        counts: Sequence[int],
        *,
        shard: Shard,
        micro_batch_size: int,
        vocab_size: int,
    ) -> None:
        self.sources = sources
        self.micro_batch_size = micro_batch_size
        self.vocab_size = vocab_size
        self.batches = validation_batches([range(number) for number in counts], shard, micro_batch_size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        worker, num_workers = worker_number()
        for source, rows in self.batches[worker::num_workers]:
            yield self._read(source, rows)

    def _read(self, source: int, rows: Sequence[int]) -> Batch:
        padded = [*rows, *[0] * (self.micro_batch_size - len(rows))]
        tokens = torch.stack([self.sources[source][index] for index in padded])
        check_vocabulary(tokens, self.vocab_size, self.sources[source].path)
        labels = tokens[:, 1:].clone()
        labels[len(rows) :] = IGNORE_INDEX
        sample_ids = torch.tensor([(source << 32) + index for index in padded])
        return {
            "input_ids": tokens[:, :-1],
            "labels": labels,
            "sample_ids": sample_ids,
            "source": source,
        }


def validation_batches(rows: Sequence[Sequence[T]], shard: Shard, micro_batch_size: int) -> list[tuple[int, list[T]]]:
    """Return one rank's batches of a validation: the number of a source, and at most `micro_batch_size` of its rows.

    Every rank gets as many; where a source's rows do not go round, some get fewer rows, or none.

    Args:
        rows: The rows of each source.
        shard: This rank's part.
        micro_batch_size: Rows of a batch.
    """
    first, size = shard.rank * micro_batch_size, micro_batch_size * shard.num_replicas
    return [
        (source, list(of_source[start + first : start + first + micro_batch_size]))
        for source, of_source in enumerate(rows)
        for start in range(0, len(of_source), size)
    ]


def check_vocabulary(tokens: Tensor, vocab_size: int, path: str) -> None:
    """Here, on the CPU, because the same fault on a GPU is an opaque device assertion."""
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise UserError(
            f"dataset {path} holds token id {largest}, outside the model's vocabulary of {vocab_size}; "
            f"raise decoder.vocab_size or prepare the data with the recipe's tokenizer"
        )


def worker_number() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
