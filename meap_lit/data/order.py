"""Which sample stands where in a run: a pure function of (seed, position), whatever the number of devices.

The run is one endless line of samples. Step s of a run with global batch G trains on positions s*G to (s+1)*G - 1,
and the ranks merely share these out. Changing the number of devices, workers or micro-batches therefore changes no
step, and a resume needs to know nothing but how many samples were seen.

Shuffling is bounded so that a dataset that streams from object storage is read chunk by chunk: the chunks are put in
random order, and samples are mixed within windows of a few neighbouring chunks. Example, window 2, two samples a
chunk: chunks 0 1 2 3 -> 2 0 | 3 1 -> samples (5 0 4 1) (2 7 3 6).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Visit(NamedTuple):
    """A sample at its place in a run."""

    source: int
    sample: int
    """Its number in the source."""
    epoch: int
    """How often the source's samples were gone through before."""


class ShuffledOrder:
    """Endless order of one dataset; every epoch visits each sample once, in another order.

    Args:
        chunk_sizes: Number of samples in each chunk.
        seed: Seed of the order; different sources of one run should differ in it.
        window: Number of neighbouring chunks whose samples are mixed.
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

    def __getitem__(self, position: int) -> int:
        """Index of the sample at `position` of the endless order."""
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            self._start_epoch(epoch)
        number = int(np.searchsorted(self._window_ends, offset, side="right"))
        if (epoch, number) != self._cached_window:
            self._load_window(epoch, number)
        return int(self._samples[offset - self._window_start])

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
    """Endless order over several sources, drawn by weight.

    Which source stands at a position depends on (seed, position) only. Its sample is the next of that source's own
    order, so a source that is drawn less often is repeated less often.

    Args:
        sources: The order of each source.
        weights: Share of samples of each source; need not add to 1.
        seed: Seed of the draw.
    """

    def __init__(self, sources: Sequence[ShuffledOrder], weights: Sequence[float], seed: int) -> None:
        self.sources = list(sources)
        self.thresholds = np.cumsum(np.asarray(weights, dtype=np.float64) / np.sum(weights))[:-1]
        self.seed = seed

    def iterate(self, start: int) -> Iterator[Visit]:
        """Yield the samples at the positions from `start` on, without end."""
        counts = np.zeros(len(self.sources), dtype=np.int64)
        for block in range(start // _BLOCK):
            counts += np.bincount(self._draw(block), minlength=len(self.sources))
        block, skip = divmod(start, _BLOCK)
        while True:
            for offset, source in enumerate(self._draw(block).tolist()):
                if offset >= skip:
                    position = int(counts[source])
                    order = self.sources[source]
                    yield Visit(source, order[position], position // order.length)
                counts[source] += 1
            block, skip = block + 1, 0

    def _draw(self, block: int) -> np.ndarray:
        """Source of each of the `_BLOCK` positions of a block."""
        uniform = rng(_SOURCES, self.seed, block).random(_BLOCK)
        return np.searchsorted(self.thresholds, uniform, side="right")


_BLOCK = 65_536
_CHUNKS, _SAMPLES, _SOURCES = 1, 2, 3  # what a generator draws, so that no two draws share a key


def rng(*key: int) -> np.random.Generator:
    """A generator that `key` alone decides; no global state is read."""
    return np.random.default_rng([part % 2**64 for part in key])
