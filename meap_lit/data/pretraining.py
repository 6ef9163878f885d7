"""The LitData streaming datamodule for pretraining."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from meap_lit.data.datamodule import StreamingData
from meap_lit.data.stream.text import TokenBlocks, TrainStream, ValidationStream, check_vocabulary
from meap_lit.errors import UserError

COUNTED_TOKENS = 4_000_000
"""Training tokens that `PretrainingData.token_counts` counts: enough for a share of rare ones, read in seconds."""


class PretrainingData(StreamingData):
    """Prepared texts, joined and cut into rows of `seq_len` tokens; arguments as in `StreamingData`."""

    kind = "text"

    def rows_in(self, epochs: int) -> int:
        return epochs * sum(len(self._open(path, "train")) for path in self.datasets)

    def describe_rows(self, start: int, stop: int) -> str:
        return f"{stop - start} row{'s' if stop - start > 1 else ''}"

    @property
    def longest_input(self) -> int:
        return self.seq_len

    @property
    def mean_span(self) -> float:
        return self.seq_len

    def token_counts(self) -> Tensor:
        """How often each token id stands in the first rows of the run, about `COUNTED_TOKENS` tokens, [V] int64.

        A run begins with chunks from all over its datasets, so these rows speak for the others. They are the same on
        every device and after a resume, and of a dataset in object storage they lie in chunks that the start needs too.
        """
        stream = self._train_stream(start=0)
        sources, samples, _ = stream.order.visits(0, -(-COUNTED_TOKENS // self.seq_len))
        # each row once, in the order of storage, however often a small dataset is gone through
        rows, times = np.unique(np.stack([sources, samples], axis=1), axis=0, return_counts=True)
        counts = np.zeros(stream.vocab_size, dtype=np.int64)
        for (source, sample), number in zip(rows.tolist(), times.tolist(), strict=True):
            tokens = stream.sources[source][sample]  # [T + 1]
            check_vocabulary(tokens, stream.vocab_size, stream.sources[source].path)
            np.add.at(counts, tokens[:-1].numpy(), number)
        return torch.from_numpy(counts)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self._train_stream(self.samples_seen), self.num_workers)

    def _train_stream(self, start: int) -> TrainStream:
        return TrainStream(
            [self._open(path, "train") for path in self.datasets],
            list(self.datasets.values()),
            seed=self.seed,
            shard=self.shard,
            micro_batch_size=self.micro_batch_size,
            start=start,
            vocab_size=self.tokenizer.vocab_size,
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if not self.paths_with_val:
            return []
        counts = self.val_counts
        stream = ValidationStream(
            [self._open(path, "val") for path in counts],
            list(counts.values()),
            shard=self.shard,
            micro_batch_size=self.micro_batch_size,
            vocab_size=self.tokenizer.vocab_size,
        )
        return self._loader(stream, num_workers=0)  # workers would be started anew at every validation

    def _num_val(self, path: str) -> int:
        return len(self._open(path, "val"))

    def _mean_val_labels(self, path: str, count: int) -> float:
        return self.seq_len

    def _open(self, path: str, split: str) -> TokenBlocks:
        blocks = TokenBlocks(f"{path.rstrip('/')}/{split}", self.seq_len, self.storage)
        if len(blocks) == 0:
            raise UserError(
                f"the {split} split of dataset {path} has no chunk with data.seq_len + 1 = {self.seq_len + 1} tokens "
                f"({self.manifests[path].splits[split].tokens} in all); shorten data.seq_len or prepare more text"
            )
        return blocks
