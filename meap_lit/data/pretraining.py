"""The LitData streaming datamodule for pretraining."""

from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from meap_lit.data.datamodule import StreamingData
from meap_lit.data.stream.order import MixedOrder
from meap_lit.data.stream.text import BlockReader, TokenBlocks
from meap_lit.errors import UserError

COUNTED_TOKENS = 4_000_000
"""Number of training tokens that `PretrainingData.token_counts` counts; they are read in seconds."""

PROMPT_TOKENS = 24
"""Tokens of the text that `PretrainingData.example_prompt` returns."""


class PretrainingData(StreamingData):
    """Prepared texts, joined and cut into rows of `seq_len` tokens; arguments as in `StreamingData`."""

    kind = "text"

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for path in self.datasets if stage == "fit" else ():
            blocks = self._open(path, "train")
            share = len(blocks) * (self.seq_len + 1) / self.manifests[path].splits["train"].tokens
            if share < 0.95:
                larger = ", or prepare it with a larger --chunk_bytes" if len(blocks.chunk_sizes) > 1 else ""
                rank_zero_info(
                    f"dataset {path}: rows of {self.seq_len} tokens hold {share:.0%} of its tokens; the end of a chunk "
                    f"file fills no row (shorten data.seq_len{larger})"
                )

    def describe_rows(self, start: int, stop: int) -> str:
        return f"{stop - start} row{'s' if stop - start > 1 else ''}"

    @property
    def longest_input(self) -> int:
        return self.seq_len

    @property
    def mean_span(self) -> float:
        return self.seq_len

    def token_counts(self) -> Tensor:
        """Count the token ids in the first rows of the run, about `COUNTED_TOKENS` tokens.

        A run begins with chunks from all parts of its datasets, so these rows are representative. They are the same on
        every device and after a resume, and a remote dataset needs their chunks at the start anyway.

        Returns:
            Occurrences of each id, [V], int64.
        """
        reader = self._reader("train")
        sources, samples, _ = self.order().visits(0, -(-COUNTED_TOKENS // self.seq_len))
        # each row once, in the order of storage, however often a small dataset is gone through
        rows, times = np.unique(np.stack([sources, samples], axis=1), axis=0, return_counts=True)
        counts = np.zeros(reader.vocab_size, dtype=np.int64)
        for (source, sample), number in zip(rows.tolist(), times.tolist(), strict=True):
            np.add.at(counts, reader.block(source, sample)[:-1].numpy(), number)
        return torch.from_numpy(counts)

    def example_prompt(self) -> str | None:
        if not self.paths_with_val:
            return None
        input_ids = self._open(self.paths_with_val[0], "val")[0][: min(PROMPT_TOKENS, self.seq_len // 2)]
        return self.tokenizer.decode(input_ids.tolist(), skip_special_tokens=True).strip()

    def order(self) -> MixedOrder:
        return self._mixed_samples()

    def _chunk_sizes(self, path: str) -> list[int]:
        return self._open(path, "train").chunk_sizes

    def _reader(self, split: Literal["train", "val"]) -> BlockReader:
        sources = [self._open(path, split) for path in self._paths_with(split)]
        return BlockReader(sources, self.seq_len, self.tokenizer.vocab_size)

    def _val_labels(self, path: str) -> np.ndarray:
        return np.full(len(self._open(path, "val")), self.seq_len)

    def _open(self, path: str, split: str) -> TokenBlocks:
        files = self.manifests[path].splits[split].files
        blocks = TokenBlocks(f"{path.rstrip('/')}/{split}", self.seq_len, self.storage, files)
        if len(blocks) == 0:
            raise UserError(
                f"the {split} split of dataset {path} has no chunk with data.seq_len + 1 = {self.seq_len + 1} tokens "
                f"({self.manifests[path].splits[split].tokens} in all); shorten data.seq_len or prepare more text"
            )
        return blocks
