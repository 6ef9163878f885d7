"""Rows of plain text: a row is one block of tokens, which are predicted one after the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from litdata import TokensLoader
from torch import Tensor

from meap_lit.data.store.remote import DEFAULT_STORAGE, Storage
from meap_lit.data.stream.order import Visit
from meap_lit.data.stream.samples import ChunkedSamples, check_vocabulary
from meap_lit.masking import id_of_sample
from meap_lit.model.loss import IGNORE_INDEX


class TextBatch(TypedDict):
    """Rows of text; tensors are int64.

    Attributes:
        input_ids: Token ids, [B, T].
        labels: Target of each position, [B, T]; `IGNORE_INDEX` in an empty row.
        sample_ids: Global index of each row's sample, [B].
        source: In validation, the number of the dataset that the rows come from.
    """

    input_ids: Tensor
    labels: Tensor
    sample_ids: Tensor
    source: NotRequired[int]


class TokenBlocks(ChunkedSamples):
    """Random access to the blocks of seq_len + 1 tokens of one split of a prepared dataset.

    Neighboring blocks share no token and never cross a chunk; LitData drops a chunk's last, incomplete block.
    """

    def __init__(
        self,
        path: str,
        seq_len: int,
        storage: Storage = DEFAULT_STORAGE,
        files: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(path, storage, files, TokensLoader(block_size=seq_len + 1))

    def __getitem__(self, index: int) -> Tensor:
        """Return block number `index`, [T + 1], int64."""
        return self._load(index).long()


@dataclass(frozen=True)
class BlockReader:
    """Reads rows of text: the first `seq_len` tokens of a block are inputs, the last `seq_len` their labels."""

    sources: Sequence[TokenBlocks]
    seq_len: int
    vocab_size: int

    def read(self, rows: Sequence[Visit], step_rows: Sequence[Visit], num_rows: int) -> TextBatch:
        """Return a batch of `rows`, filled up with empty ones; see `BatchReader.read`."""
        blocks = [self.block(source, sample) for source, sample, _ in rows]
        empty = torch.zeros(self.seq_len + 1, dtype=torch.int64)
        tokens = torch.stack(blocks + [empty] * (num_rows - len(rows)))  # [B, T + 1]
        labels = tokens[:, 1:].clone()
        labels[len(rows) :] = IGNORE_INDEX
        sample_ids = torch.zeros(num_rows, dtype=torch.int64)
        sample_ids[: len(rows)] = torch.tensor([id_of_sample(source, sample) for source, sample, _ in rows])
        return TextBatch(input_ids=tokens[:, :-1].contiguous(), labels=labels, sample_ids=sample_ids)

    def block(self, source: int, sample: int) -> Tensor:
        """Return one block, [T + 1], int64; raise `UserError` if a token id is outside the vocabulary."""
        tokens = self.sources[source][sample]
        check_vocabulary(tokens, self.vocab_size, self.sources[source].path)
        return tokens
