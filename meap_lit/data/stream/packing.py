"""Pack samples into rows of a fixed length, and order the rows of a run.

As in `order.py`, the run is one endless line, here of rows, and step s trains on rows s*G to (s+1)*G - 1 whatever the
number of devices. Only lengths are needed to know it. The endless line of samples is cut into windows; the documents
of a window are packed, and its rows shuffled. Example, rows of 8 tokens:

    lengths 5 3 6 2 4 -> rows (6 2) (5 3) (4)
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Literal, NamedTuple

import numpy as np

from meap_lit.data.store.chunks import ChatIndex
from meap_lit.data.stream.order import MixedOrder, Visit, Visits, rng
from meap_lit.masking.duplication import Duplication


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest row that still has room for it.

    Given the length of each document, in [1, capacity], return the indices of the documents of each row. Equal lengths
    are taken in the order given.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room they have left
    rooms = 0  # bit r is set when some row has room for exactly r tokens: the fullest fit is one shift away
    longest_first = np.argsort(-np.asarray(lengths), kind="stable")
    for index, length in zip(longest_first.tolist(), np.asarray(lengths)[longest_first].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            rows_of_room = with_room[room]
            row = rows_of_room.pop()
            if not rows_of_room:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > length:
            left = room - length
            with_room[left].append(row)
            rooms |= 1 << left
    return rows


@dataclass(frozen=True)
class Sizes:
    """Sizes of the samples of one source after their duplication; each [N], int64 or bool."""

    num_tokens: np.ndarray
    num_masked: np.ndarray
    """Masked tokens of the copy, |U_m|; 0 where a sample gets none."""
    num_supervised: np.ndarray
    """Supervised tokens of the original, |U_q|."""
    without_room: np.ndarray
    """Whether a sample lost its copy because it does not fit twice into a row."""

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
        """Return the length of every document of an epoch, in no particular order, int64."""
        tokens = self.num_tokens.astype(np.int64)
        copied = self.num_masked > 0
        if layout == "concat":
            return np.where(copied, 2 * tokens, tokens)
        return np.concatenate((tokens, tokens[copied]))


def _per_sample(of_answers: np.ndarray, num_answers: np.ndarray) -> np.ndarray:
    """Return sums, [N], over the answers of each sample of `of_answers`, [A]; sample n has `num_answers[n]` of them."""
    sums = np.concatenate(([0], np.cumsum(of_answers, dtype=np.int64)))
    last = np.cumsum(num_answers)
    return sums[last] - sums[last - num_answers]


class DocumentKey(NamedTuple):
    """Names a document: a visit of a sample as original, as masked copy, or as both in one document."""

    visit: Visit
    has_original: bool
    has_copy: bool


@dataclass(frozen=True)
class Row:
    """The documents of one row, from left to right, and their sizes."""

    documents: tuple[DocumentKey, ...]
    num_tokens: int
    """Tokens without the row's padding."""
    num_labels: int
    """Supervised tokens, |U_q| + |U_m|."""
    num_masked: int
    """Masked tokens of copies, |U_m|."""
    num_copies: int


def pack_rows(
    visits: Iterable[Visit], sizes: Sequence[Sizes], seq_len: int, layout: Literal["concat", "separate"]
) -> list[Row]:
    """Pack the documents of `visits` into rows."""
    columns = np.array(list(visits), dtype=np.int64).reshape(-1, 3).T
    return Window.pack(Visits(*columns), sizes, seq_len, layout).rows()


@dataclass(frozen=True)
class Window:
    """Documents packed together, as columns, [D]; see `DocumentKey` and `Row`."""

    visits: Visits
    has_original: np.ndarray
    has_copy: np.ndarray
    num_tokens: np.ndarray
    num_labels: np.ndarray
    num_masked: np.ndarray
    places: list[list[int]]
    """Numbers of the documents of each row."""

    @classmethod
    def pack(
        cls, visits: Visits, sizes: Sequence[Sizes], seq_len: int, layout: Literal["concat", "separate"]
    ) -> "Window":
        """Pack the documents of `visits` into rows of `seq_len` tokens."""
        has_copy = _look_up(sizes, "num_masked", visits) > 0
        has_original = np.ones_like(has_copy)
        if layout == "separate":  # a copy follows its original
            num_documents = 1 + has_copy
            visits = Visits(*(np.repeat(column, num_documents) for column in visits))
            has_copy = np.repeat(has_copy, num_documents)
            has_copy[np.cumsum(num_documents) - num_documents] = False
            has_original = ~has_copy
        num_tokens = _look_up(sizes, "num_tokens", visits) * (has_original.astype(np.int64) + has_copy)
        num_masked = _look_up(sizes, "num_masked", visits) * has_copy
        num_labels = _look_up(sizes, "num_supervised", visits) * has_original + num_masked
        return cls(visits, has_original, has_copy, num_tokens, num_labels, num_masked, pack(num_tokens, seq_len))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.places)

    def shuffle(self, generator: np.random.Generator) -> "Window":
        """Return the same rows in another order."""
        return replace(self, places=[self.places[row] for row in generator.permutation(len(self)).tolist()])

    def rows(self, start: int = 0) -> list[Row]:
        """Return the rows from number `start` on."""
        visits = map(Visit, *(column.tolist() for column in self.visits))
        keys = list(map(DocumentKey, visits, self.has_original.tolist(), self.has_copy.tolist()))
        counts = [column.tolist() for column in (self.num_tokens, self.num_labels, self.num_masked, self.has_copy)]
        return [
            Row(tuple(keys[place] for place in row), *(sum(count[place] for place in row) for count in counts))
            for row in self.places[start:]
        ]

    def tokens_of_sources(self, num_rows: int, num_sources: int) -> np.ndarray:
        """Return the tokens of each source in the first `num_rows` rows, [S] int64."""
        places = list(chain.from_iterable(self.places[:num_rows]))
        tokens = np.zeros(num_sources, dtype=np.int64)
        np.add.at(tokens, self.visits.sources[places], self.num_tokens[places])
        return tokens


def _look_up(sizes: Sequence[Sizes], name: str, visits: Visits) -> np.ndarray:
    """Return the size `name` of the sample of each visit, [N] int64."""
    values = np.empty_like(visits.samples)
    for source, of_source in enumerate(sizes):
        places = np.flatnonzero(visits.sources == source)
        values[places] = getattr(of_source, name)[visits.samples[places]]
    return values


class PackedOrder:
    """The endless line of rows of a run: the documents of the endless line of samples, none longer than a row.

    At most `window` samples are packed together; an epoch is cut into equal windows.
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
        self.epoch = sum(map(len, sizes))
        self.num_windows = -(-self.epoch // window)
        # Rows before each window, and their tokens by source, for the windows counted so far. To count a window, those
        # before it must be packed, which takes a microsecond per sample.
        self._first_rows = [0]
        self._tokens = [np.zeros(len(sizes), dtype=np.int64)]
        self._cached: tuple[int, Window] | None = None

    def iterate(self, start: int) -> Iterator[Row]:
        """Yield the rows from row `start` on, without end."""
        first = self._locate(start)
        start -= self._first_rows[first]
        for number in count(first):
            yield from self._window(number).rows(start)
            start = 0

    def num_rows(self, epochs: int) -> int:
        """Return the rows that `epochs` epochs fill; an epoch is as many samples as all sources have together."""
        while len(self._first_rows) <= epochs * self.num_windows:
            self._count_window()
        return self._first_rows[epochs * self.num_windows]

    def count_by_source(self, end: int) -> np.ndarray:
        """Return the tokens of each source in the first `end` rows, [S] int64."""
        number = self._locate(end)
        rows = end - self._first_rows[number]
        return self._tokens[number] + self._window(number).tokens_of_sources(rows, len(self.sizes))

    def _locate(self, row: int) -> int:
        """Return the number of the window that holds a row."""
        while self._first_rows[-1] <= row:
            self._count_window()
        return bisect_right(self._first_rows, row) - 1

    def _count_window(self) -> None:
        """Count the rows and tokens of the first window that is not counted yet."""
        window = self._window(len(self._first_rows) - 1)
        self._first_rows.append(self._first_rows[-1] + len(window))
        self._tokens.append(self._tokens[-1] + window.tokens_of_sources(len(window), len(self.sizes)))

    def _window(self, number: int) -> Window:
        if self._cached is None or self._cached[0] != number:
            epoch, part = divmod(number, self.num_windows)
            size, num_larger = divmod(self.epoch, self.num_windows)
            start = epoch * self.epoch + part * size + min(part, num_larger)
            visits = self.samples.visits(start, start + size + (part < num_larger))
            window = Window.pack(visits, self.sizes, self.seq_len, self.layout)
            self._cached = number, window.shuffle(rng(_ROWS, self.seed, number))
        return self._cached[1]


_ROWS = 4  # a kind of draw, beside those of order.py
