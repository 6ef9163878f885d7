"""The LitData streaming datamodule for pretraining."""

from torch.utils.data import DataLoader

from meap_lit.data.datamodule import StreamingData
from meap_lit.data.streaming import TokenBlocks, TrainStream, ValidationStream
from meap_lit.errors import UserError


class PretrainingData(StreamingData):
    """Prepared texts, joined and cut into rows of `seq_len` tokens; arguments as in `StreamingData`."""

    kind = "text"

    def steps_in(self, epochs: int) -> int:
        rows = sum(len(self._open(path, "train")) for path in self.datasets)
        return epochs * rows // self.global_batch_size

    @property
    def longest_input(self) -> int:
        return self.seq_len

    @property
    def mean_span(self) -> float:
        return self.seq_len

    def train_dataloader(self) -> DataLoader:
        stream = TrainStream(
            [self._open(path, "train") for path in self.datasets],
            list(self.datasets.values()),
            seed=self.seed,
            shard=self.shard,
            micro_batch_size=self.micro_batch_size,
            start=self.samples_seen,
            vocab_size=self.tokenizer.vocab_size,
        )
        return self._loader(stream, self.num_workers)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if not self.paths_with_val:
            return []
        sources = [self._open(path, "val") for path in self.paths_with_val]
        available = sum(map(len, sources))
        stream = ValidationStream(
            sources,
            num_samples=min(available, self.val_samples or available),
            shard=self.shard,
            micro_batch_size=self.micro_batch_size,
            vocab_size=self.tokenizer.vocab_size,
        )
        return self._loader(stream, num_workers=0)  # workers would be started anew at every validation

    def _open(self, path: str, split: str) -> TokenBlocks:
        blocks = TokenBlocks(f"{path.rstrip('/')}/{split}", self.seq_len, self.storage)
        if len(blocks) == 0:
            raise UserError(
                f"the {split} split of dataset {path} has no chunk with data.seq_len + 1 = {self.seq_len + 1} tokens "
                f"({self.manifests[path].splits[split].tokens} in all); shorten data.seq_len or prepare more text"
            )
        return blocks
