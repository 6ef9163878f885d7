"""Which rows a rank and its workers read, in micro-batches; the rows of a step do not depend on how many there are."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from meap_lit.data.stream.order import MixedOrder
from meap_lit.data.stream.packing import PackedOrder

T = TypeVar("T")


@dataclass(frozen=True)
class Slice:
    """The slice of every global batch that one of `num_replicas` data-parallel ranks reads."""

    rank: int = 0
    num_replicas: int = 1

    def micro_batches(self, rows: Sequence[T], size: int) -> list[Sequence[T]]:
        """Deal rows out to the ranks, `size` at a time, and return this rank's.

        Every rank gets equally many micro-batches; where the rows run out, some are short or empty. Example: of rows
        0 to 6, dealt out to two ranks in micro-batches of two, rank 0 gets `[0, 1] [4, 5]` and rank 1 `[2, 3] [6]`.
        """
        starts = range(self.rank * size, len(rows) + self.rank * size, size * self.num_replicas)
        return [rows[start : start + size] for start in starts]


class BatchReader(Protocol):
    """Reads rows into batches."""

    def read(self, rows: Sequence[Any], step_rows: Sequence[Any], num_rows: int) -> Any:
        """Return a batch.

        Args:
            rows: What the first rows of the batch hold.
            step_rows: All rows of the optimizer step, over its micro-batches and ranks.
            num_rows: Rows of the batch; those that are left hold no label.
        """


class TrainStream(IterableDataset):
    """One rank's micro-batches of a run, epoch after epoch without a seam or an end.

    `start` is the number of rows that the run, all ranks together, has seen already.
    """

    def __init__(
        self,
        order: MixedOrder | PackedOrder,
        reader: BatchReader,
        *,
        rank_slice: Slice,
        global_batch_size: int,
        micro_batch_size: int,
        start: int,
    ) -> None:
        self.order = order
        self.reader = reader
        self.rank_slice = rank_slice
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.start = start

    def __iter__(self) -> Iterator[Any]:
        for rows, step_rows in _of_worker(self._micro_batches()):
            yield self.reader.read(rows, step_rows, self.micro_batch_size)

    def _micro_batches(self) -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
        """Yield the rows of each micro-batch and those of its step."""
        rows = self.order.iterate(self.start)
        while True:
            step_rows = list(islice(rows, self.global_batch_size))
            for micro_batch in self.rank_slice.micro_batches(step_rows, self.micro_batch_size):
                yield micro_batch, step_rows


class ValidationStream(IterableDataset):
    """Given rows, once, in their order; the rows of a batch are from one dataset.

    Every rank gets equally many batches of equal size: rows past the end hold no label, so that no rank waits for
    another and the loss does not depend on the number of ranks. `rows` are those of each dataset.
    """

    def __init__(
        self, rows: Sequence[Sequence[Any]], reader: BatchReader, *, rank_slice: Slice, micro_batch_size: int
    ) -> None:
        self.reader = reader
        self.micro_batch_size = micro_batch_size
        self.batches = [
            (source, micro_batch)
            for source, of_source in enumerate(rows)
            for micro_batch in rank_slice.micro_batches(of_source, micro_batch_size)
        ]
        """Number of a dataset, and some of its rows."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for source, rows in _of_worker(self.batches):
            yield {**self.reader.read(rows, rows, self.micro_batch_size), "source": source}


def _of_worker(batches: Iterable[T]) -> Iterator[T]:
    """Yield what this process reads; a `DataLoader` takes from its workers in turn, which keeps the order."""
    worker = get_worker_info()
    return iter(batches) if worker is None else islice(batches, worker.id, None, worker.num_workers)
