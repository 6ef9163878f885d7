"""Micro-batches of packed conversations, read from LitData chunks in an order that does not depend on the devices."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, islice
from typing import NotRequired, TypedDict

import torch
from litdata import StreamingDataset
from litdata.streaming.sampler import ChunkedIndex
from torch import Tensor
from torch.utils.data import IterableDataset

from meap_lit.data.store.cache import open_chunks
from meap_lit.data.store.remote import Storage
from meap_lit.data.stream.packing import DocumentKey, PackedOrder, Row
from meap_lit.data.stream.text import Shard, check_vocabulary, validation_batches, worker_number
from meap_lit.masking.duplication import Answer, Document, Duplication, concatenate, masked_copy, original
from meap_lit.model.attention import Documents
from meap_lit.model.loss import IGNORE_INDEX

_DEFAULT = Storage()


class PackedBatch(TypedDict):
    """Packed rows; tensors are [B, T].

    Args:
        input_ids: Token ids, int64.
        labels: Target of each position, int64; `IGNORE_INDEX` where nothing is learnt.
        position_ids: Positions within each document, int64.
        in_copy: Whether a position belongs to a masked copy, bool.
        documents: Which runs of tokens attend among themselves.
        num_labels: Supervised tokens of the whole optimizer step, over its micro-batches and all devices.
        num_masked: Those of them that are masked tokens of copies.
        num_copies: Masked copies of the whole step.
        num_tokens: Tokens of the whole step, without the empty rests of rows.
        source: In validation, the number of the dataset that the rows are of.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    in_copy: Tensor
    documents: Documents
    num_labels: int
    num_masked: int
    num_copies: int
    num_tokens: int
    source: NotRequired[int]


class ChatSamples:
    """Random access to the samples of one split of a dataset of conversations.

    Args:
        path: Folder or s3:// address of the split.
        chunk_sizes: Samples in each of its chunks.
        vocab_size: Token ids must be below it.
        storage: How a remote dataset is read.
    """

    def __init__(self, path: str, chunk_sizes: Sequence[int], vocab_size: int, storage: Storage = _DEFAULT) -> None:
        self.path = path
        self.vocab_size = vocab_size
        self._chunks = open_chunks(path, storage)
        self._dataset = StreamingDataset(self._chunks.folder, shuffle=False)
        len(self._dataset)  # reads the index
        self._ends = list(accumulate(chunk_sizes))

    def __getitem__(self, index: int) -> tuple[Tensor, list[Answer]]:
        """Token ids, [n] int64, and answers of sample number `index`."""
        chunk = bisect.bisect_right(self._ends, index)  # LitData's own look-up walks over all chunks
        self._chunks.ensure(chunk)
        sample = self._dataset[ChunkedIndex(index=index, chunk_index=chunk)]
        input_ids = sample["input_ids"].long()
        check_vocabulary(input_ids, self.vocab_size, self.path)
        return input_ids, [Answer(*answer) for answer in sample["answers"].tolist()]


@dataclass(frozen=True)
class RowReader:
    """Reads rows and lays their documents out, masks drawn.

    Args:
        sources: Token ids and answers of the samples of each source, by number.
        duplication: How copies are masked and where they stand.
        seq_len: Length of a row.
        mask_token_id: Id of the mask token.
        pad_token_id: Id that fills the rest of a row; any will do, since nothing attends to it.
        seed: Seed of the masks.
    """

    sources: Sequence[ChatSamples | Sequence[tuple[Tensor, list[Answer]]]]
    duplication: Duplication
    seq_len: int
    mask_token_id: int
    pad_token_id: int
    seed: int

    def read(self, rows: Sequence[Row], step_rows: Sequence[Row]) -> PackedBatch:
        """A batch of `rows`, which are some of the rows of an optimizer step, `step_rows`."""
        documents = [[self.document(key) for key in row.documents] for row in rows]
        shape = (len(rows), self.seq_len)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORE_INDEX)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        in_copy = torch.zeros(shape, dtype=torch.bool)
        for number, row in enumerate(documents):
            start = 0
            for document in row:
                place = (number, slice(start, start + len(document)))
                input_ids[place] = document.input_ids
                labels[place] = document.labels
                position_ids[place] = document.position_ids
                in_copy[place] = document.in_copy
                start += len(document)
        return PackedBatch(
            input_ids=input_ids,
            labels=labels,
            position_ids=position_ids,
            in_copy=in_copy,
            documents=Documents.of_rows([[len(document) for document in row] for row in documents], self.seq_len),
            num_labels=sum(row.num_labels for row in step_rows),
            num_masked=sum(row.num_masked for row in step_rows),
            num_copies=sum(row.num_copies for row in step_rows),
            num_tokens=sum(row.num_tokens for row in step_rows),
        )

    def document(self, key: DocumentKey) -> Document:
        """What `key` stands for, masks drawn."""
        source, sample, epoch = key.visit
        input_ids, answers = self.sources[source][sample]
        if not key.has_copy:
            return original(input_ids, answers)
        copy = masked_copy(
            input_ids,
            answers,
            self.duplication,
            mask_token_id=self.mask_token_id,
            seed=self.seed,
            sample_id=(source << 32) + sample,
            visit=epoch,
        )
        if not key.has_original:
            return copy
        return concatenate(original(input_ids, answers), copy, self.duplication.copy_positions)


class PackedTrainStream(IterableDataset):
    """One rank's micro-batches of a run, epoch after epoch without a seam or an end.

    Args:
        order: The line of rows.
        reader: Reads them.
        shard: This rank's part.
        global_batch_size: Rows of an optimizer step, over all ranks.
        micro_batch_size: Rows of a micro-batch.
        start: Rows that the run, all ranks together, has seen already.
    """

    def __init__(
        self,
        order: PackedOrder,
        reader: RowReader,
        *,
        shard: Shard,
        global_batch_size: int,
        micro_batch_size: int,
        start: int,
    ) -> None:
        self.order = order
        self.reader = reader
        self.shard = shard
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.start = start

    def __iter__(self) -> Iterator[PackedBatch]:
        worker, num_workers = worker_number()
        rows = self.order.iterate(self.start)
        numbers = count()  # of this rank's micro-batches
        first_of_rank = self.shard.rank * self.micro_batch_size
        while True:
            step_rows = list(islice(rows, self.global_batch_size))
            for start in range(0, len(step_rows), self.micro_batch_size * self.shard.num_replicas):
                if next(numbers) % num_workers == worker:  # the loader takes from its workers in turn
                    first = start + first_of_rank
                    yield self.reader.read(step_rows[first : first + self.micro_batch_size], step_rows)


class PackedValidationStream(IterableDataset):
    """Given rows, once; a batch is of one dataset. Every rank gets equally many batches; rows past the end are empty.

    Args:
        rows: The rows of each dataset, of originals only.
        reader: Reads them.
        shard: This rank's part.
        micro_batch_size: Rows of a batch.
    """

    def __init__(
        self, rows: Sequence[Sequence[Row]], reader: RowReader, *, shard: Shard, micro_batch_size: int
    ) -> None:
        self.reader = reader
        self.micro_batch_size = micro_batch_size
        self.batches = validation_batches(rows, shard, micro_batch_size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[PackedBatch]:
        worker, num_workers = worker_number()
        empty = Row((), num_tokens=0, num_labels=0, num_masked=0, num_copies=0)
        for source, some in self.batches[worker::num_workers]:
            rows = some + [empty] * (self.micro_batch_size - len(some))
            yield {**self.reader.read(rows, rows), "source": source}
