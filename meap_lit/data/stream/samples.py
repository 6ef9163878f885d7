"""Random access to the samples of a prepared dataset, read from LitData chunks."""

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from litdata import StreamingDataset
from litdata.streaming.item_loader import BaseItemLoader
from litdata.streaming.sampler import ChunkedIndex
from torch import Tensor

from meap_lit.data.store.cache import open_chunks
from meap_lit.data.store.remote import DEFAULT_STORAGE, Storage
from meap_lit.errors import UserError


class ChunkedSamples:
    """Random access to the samples of the split at `path`, a folder or an address, which is fetched chunk by chunk.

    Args:
        path: The split.
        storage: How an address is read.
        files: Hashes of the files that describe the split, from its manifest; nothing is compared without them.
        item_loader: How LitData cuts a chunk into samples, if it is not as they were written.
    """

    def __init__(
        self,
        path: str,
        storage: Storage = DEFAULT_STORAGE,
        files: Mapping[str, str] | None = None,
        item_loader: BaseItemLoader | None = None,
    ) -> None:
        self.path = path
        self._chunks = open_chunks(path, storage, files)
        self._dataset = StreamingDataset(self._chunks.folder, item_loader=item_loader, shuffle=False)
        len(self._dataset)  # reads the index
        assert self._dataset.shuffler is not None
        intervals = self._dataset.shuffler.cache.get_chunk_intervals()
        self.chunk_sizes = [last - first for first, _, _, last in intervals]
        """Samples in each chunk."""
        self._ends = [last for _, _, _, last in intervals]

    def __len__(self) -> int:
        return self._ends[-1]

    def _load(self, index: int) -> Any:
        """Return sample number `index` as it is stored."""
        chunk = bisect_right(self._ends, index)  # LitData's own look-up walks over all chunks
        self._chunks.ensure(chunk)
        return self._dataset[ChunkedIndex(index=index, chunk_index=chunk)]


def check_vocabulary(tokens: Tensor, vocab_size: int, path: str) -> None:
    """Raise `UserError` if a token id is outside the vocabulary; on a GPU that would be an opaque device assertion."""
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise UserError(
            f"dataset {path} holds token id {largest}, outside the model's vocabulary of {vocab_size}; "
            f"raise decoder.vocab_size or prepare the data with the recipe's tokenizer"
        )
