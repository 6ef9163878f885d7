"""Samples into rows of a fixed length: which documents share a row, and which row stands where in a run.

As in `order.py`, the run is one endless line, here of rows, and step s trains on rows s*G to (s+1)*G - 1 whatever the
number of devices. Only lengths are needed to know it. The endless line of samples is cut into windows; the documents
of a window are packed, and its rows shuffled. Example, rows of 8 tokens:

    lengths 5 3 6 2 4 -> rows (6 2) (5 3) (4)
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal, NamedTuple

import numpy as np

from meap_lit.data.chunks import ChatIndex
from meap_lit.data.order import MixedOrder, Visit, rng
from meap_lit.duplication import Duplication


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest row that still has room for it.

    Args:
        lengths: Length of each document, in [1, capacity]. Equal lengths are taken in the order given.
        capacity: Length of a row.

    Returns:
        Indices of the documents of each row.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # rows by the room they have left
    rooms = 0  # bit r is set when some row has room for exactly r tokens: the fullest fit is one shift away
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[index])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > length:
            with_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows


@dataclass(frozen=True)
class Sizes:
    """What the samples of one source will count once they are duplicated; each [N].

    Args:
        num_tokens: Tokens of the sample.
        num_masked: Masked tokens of its copy, |U_m|; 0 where it gets no copy.
        num_supervised: Supervised tokens of the original, |U_q|.
        without_room: Samples that lost their copy because they do not fit twice into a row.
    """

    num_tokens: np.ndarray
    num_masked: np.ndarray
    num_supervised: np.ndarray
    without_room: np.ndarray

    def __len__(self) -> int:
        return len(self.num_tokens)

    @classmethod
    def of(cls, index: ChatIndex, duplication: Duplication, seq_len: int) -> "Sizes":
        answers, closing = index.answer_tokens.T
        masked = _per_sample(duplication.num_masked(answers), index.num_answers)
        without_room = (masked > 0) & (2 * index.num_tokens > seq_len) & (duplication.layout == "concat")
        supervised = _per_sample(answers + closing, index.num_answers)
        return cls(index.num_tokens, np.where(without_room, 0, masked), supervised, without_room)

    def spans(self, layout: Literal["concat", "separate"]) -> np.ndarray:
        """Length of every document of an epoch, in no order that matters, int64."""
        tokens = self.num_tokens.astype(np.int64)
        copied = self.num_masked > 0
        if layout == "concat":
            return np.where(copied, 2 * tokens, tokens)
        return np.concatenate((tokens, tokens[copied]))


def _per_sample(of_answers: np.ndarray, num_answers: np.ndarray) -> np.ndarray:
    """Sums over the answers of each sample, [N] for [A] and the number of answers of each sample, [N]."""
    sums = np.concatenate(([0], np.cumsum(of_answers, dtype=np.int64)))
    last = np.cumsum(num_answers)
    return sums[last] - sums[last - num_answers]


class DocumentKey(NamedTuple):
    """What stands in a row: a visit of a sample as itself, as its masked copy, or as both in one document."""

    visit: Visit
    has_original: bool
    has_copy: bool


@dataclass(frozen=True)
class Row:
    """The documents of one row and what they count.

    Args:
        documents: From left to right.
        num_tokens: Tokens, the row's empty rest not counted.
        num_labels: Supervised tokens, |U_q| + |U_m|.
        num_masked: Masked tokens of copies, |U_m|.
        num_copies: Masked copies.
    """

    documents: tuple[DocumentKey, ...]
    num_tokens: int
    num_labels: int
    num_masked: int
    num_copies: int


def pack_rows(
    visits: Iterable[Visit], sizes: Sequence[Sizes], seq_len: int, layout: Literal["concat", "separate"]
) -> list[Row]:
    """Rows of the documents that the samples of `visits` make."""
    documents, lengths = [], []
    for visit in visits:
        num_tokens = int(sizes[visit.source].num_tokens[visit.sample])
        if sizes[visit.source].num_masked[visit.sample] == 0:
            forms = [(True, False)]
        else:
            forms = [(True, True)] if layout == "concat" else [(True, False), (False, True)]
        for has_original, has_copy in forms:
            documents.append(DocumentKey(visit, has_original, has_copy))
            lengths.append(num_tokens * (has_original + has_copy))
    return [_row([documents[index] for index in row], sizes) for row in pack(lengths, seq_len)]


def _row(documents: Sequence[DocumentKey], sizes: Sequence[Sizes]) -> Row:
    num_tokens = num_answer = num_masked = num_copies = 0
    for (source, sample, _), has_original, has_copy in documents:
        num_tokens += int(sizes[source].num_tokens[sample]) * (has_original + has_copy)
        num_answer += int(sizes[source].num_supervised[sample]) * has_original
        num_masked += int(sizes[source].num_masked[sample]) * has_copy
        num_copies += has_copy
    return Row(tuple(documents), num_tokens, num_answer + num_masked, num_masked, num_copies)


class PackedOrder:
    """The endless line of rows of a run.

    Args:
        samples: The endless line of samples.
        sizes: Sizes of the samples of each of its sources.
        seq_len: Length of a row; no document is longer.
        layout: Where a copy stands.
        seed: Seed of the order of rows.
        window: Most samples that are packed together; an epoch is cut into equal windows of at most so many.
    """

    def __init__(
        self,
        samples: MixedOrder,
        sizes: Sequence[Sizes],
        *,
        seq_len: int,
        layout: Literal["concat", "separate"],
        seed: int,
        window: int = 16_384,
    ) -> None:
        self.samples = samples
        self.sizes = sizes
        self.seq_len = seq_len
        self.layout = layout
        self.seed = seed
        epoch = sum(map(len, sizes))
        num_windows = -(-epoch // window)
        self.window_sizes = [epoch // num_windows + (number < epoch % num_windows) for number in range(num_windows)]

    def iterate(self, start: int) -> Iterator[Row]:
        """Yield the rows from row `start` on, without end."""
        # how many rows a window makes is known only once it is packed, which takes a few microseconds a sample
        for rows in self._windows():
            yield from rows[start:]
            start = max(0, start - len(rows))

    def num_rows(self, epochs: int) -> int:
        """Rows that `epochs` epochs fill; with several sources an epoch is as many samples as they have together."""
        return sum(len(rows) for rows in islice(self._windows(), epochs * len(self.window_sizes)))

    def _windows(self) -> Iterator[list[Row]]:
        visits = self.samples.iterate(0)
        for number, size in enumerate(cycle(self.window_sizes)):
            rows = pack_rows(islice(visits, size), self.sizes, self.seq_len, self.layout)
            order = rng(_ROWS, self.seed, number).permutation(len(rows))
            yield [rows[place] for place in order]


_ROWS = 4  # a kind of draw, beside those of order.py
