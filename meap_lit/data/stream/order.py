"""The order of samples in a run: a pure function of (seed, position), for any number of devices.

The run is one endless line of samples. Step s of a run with global batch G trains on positions s*G to (s+1)*G - 1,
and the ranks divide these among them. The number of devices, workers or micro-batches therefore changes no step,
and a resume needs only the step.

Shuffling is bounded, so that a dataset in object storage can be read chunk by chunk: the chunks are shuffled, and
samples are mixed within windows of a few neighboring chunks. Example, window 2, two samples a
chunk: chunks 0 1 2 3 -> 2 0 | 3 1 -> samples (5 0 4 1) (2 7 3 6).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Visit(NamedTuple):
    """One use of a sample in a run."""

    source: int
    sample: int
    """Its number in the source."""
    epoch: int
    """Number of earlier passes over the source."""


class Visits(NamedTuple):
    """Neighboring visits as columns, each [N] int64."""

    sources: np.ndarray
    samples: np.ndarray
    epochs: np.ndarray


class ShuffledOrder:
    """The endless order of one dataset; every epoch visits each sample once, in another order.

    Args:
        chunk_sizes: Number of samples in each chunk.
        seed: Seed of the order; different sources of one run should differ in it.
        window: Number of neighboring chunks whose samples are mixed.
    """

    def __init__(self, chunk_sizes: Sequence[int], seed: Sequence[int], window: int = 8) -> None:
        self.chunk_sizes = np.asarray(chunk_sizes, dtype=np.int64)
        self.first = np.cumsum(self.chunk_sizes) - self.chunk_sizes  # index of each chunk's first sample
        self.length = int(self.chunk_sizes.sum())
        assert self.length > 0, "an order needs at least one sample"
        self.seed = list(seed)
        self.window = window
        self._epoch = -1
        self._cached_window = (-1, -1)

    def take(self, start: int, stop: int) -> np.ndarray:
        """Return the indices of the samples at the positions from `start` to `stop` - 1 of the endless order, int64."""
        parts = [np.empty(0, dtype=np.int64)]
        while start < stop:
            epoch, offset = divmod(start, self.length)
            if epoch != self._epoch:
                self._start_epoch(epoch)
            number = int(np.searchsorted(self._window_ends, offset, side="right"))
            if (epoch, number) != self._cached_window:
                self._load_window(epoch, number)
            first = offset - self._window_start
            parts.append(self._samples[first : first + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._chunks = rng(_CHUNKS, *self.seed, epoch).permutation(len(self.chunk_sizes))
        ends = np.cumsum(self.chunk_sizes[self._chunks])
        # last chunk of each window; a final short window ends with the last chunk
        last = np.minimum(np.arange(self.window, len(ends) + self.window, self.window), len(ends)) - 1
        self._window_ends = ends[last]

    def _load_window(self, epoch: int, number: int) -> None:
        chunks = self._chunks[number * self.window : (number + 1) * self.window]
        samples = np.concatenate([self.first[c] + np.arange(self.chunk_sizes[c]) for c in chunks])
        self._samples = rng(_SAMPLES, *self.seed, epoch, number).permutation(samples)
        self._window_start = self._window_ends[number] - len(samples)
        self._cached_window = (epoch, number)


class MixedOrder:
    """The endless order of several sources, drawn by weight.

    The source at a position depends on (seed, position) only. Its sample is the next in that source's own order, so a
    source that is drawn less often is repeated less often. The weights, shares of samples, need not add to 1.
    """

    def __init__(self, sources: Sequence[ShuffledOrder], weights: Sequence[float], seed: int) -> None:
        self.sources = list(sources)
        self.thresholds = np.cumsum(np.asarray(weights, dtype=np.float64) / np.sum(weights))[:-1]
        self.seed = seed
        self._counts = [np.zeros(len(self.sources), dtype=np.int64)]  # before each block, as far as was asked for

    def iterate(self, start: int) -> Iterator[Visit]:
        """Yield the visits at the positions from `start` on, without end."""
        while True:
            stop = start - start % _BLOCK + _BLOCK
            yield from map(Visit, *(column.tolist() for column in self.visits(start, stop)))
            start = stop

    def visits(self, start: int, stop: int) -> Visits:
        """Return the visits at the positions from `start` to `stop` - 1."""
        blocks = range(start // _BLOCK, -(-stop // _BLOCK))
        sources = np.concatenate([self._draw(block) for block in blocks])[start % _BLOCK :][: stop - start]
        samples, epochs = np.empty_like(sources), np.empty_like(sources)
        for source, (order, first) in enumerate(zip(self.sources, self.count_by_source(start).tolist(), strict=True)):
            places = np.flatnonzero(sources == source)
            samples[places] = order.take(first, first + len(places))
            epochs[places] = np.arange(first, first + len(places)) // order.length
        return Visits(sources, samples, epochs)

    def num_rows(self, epochs: int) -> int:
        """Return the positions that `epochs` epochs fill; an epoch is as many samples as all sources have together."""
        return epochs * sum(order.length for order in self.sources)

    def count_by_source(self, end: int) -> np.ndarray:
        """Return the number of samples of each source among the first `end` positions, [S] int64."""
        block, offset = divmod(end, _BLOCK)
        while len(self._counts) <= block:
            self._counts.append(self._counts[-1] + self._count_drawn(len(self._counts) - 1, _BLOCK))
        return self._counts[block] + self._count_drawn(block, offset)

    def _draw(self, block: int) -> np.ndarray:
        """Return the source of each of the `_BLOCK` positions of a block."""
        uniform = rng(_SOURCES, self.seed, block).random(_BLOCK)
        return np.searchsorted(self.thresholds, uniform, side="right")

    def _count_drawn(self, block: int, num: int) -> np.ndarray:
        return np.bincount(self._draw(block)[:num], minlength=len(self.sources))


_BLOCK = 65_536
_CHUNKS, _SAMPLES, _SOURCES = 1, 2, 3  # what a generator draws, so that no two draws share a key


def rng(*key: int) -> np.random.Generator:
    """Return a generator that depends on `key` only; no global state is read."""
    return np.random.default_rng([part % 2**64 for part in key])
