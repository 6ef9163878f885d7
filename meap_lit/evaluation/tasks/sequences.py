"""Tasks on the token sequences of a prepared dataset."""

from dataclasses import dataclass
from typing import Any, Literal

from meap_lit.data.store.manifest import Manifest
from meap_lit.data.stream.text import TokenBlocks
from meap_lit.errors import UserError, check_range
from meap_lit.evaluation.task import Item, Task
from meap_lit.inference.language_model import LanguageModel


@dataclass(kw_only=True)
class SequenceTask(Task):
    """A task on the first sequences of a prepared dataset of text, cut as in training and validation.

    Args:
        dataset: Folder or s3:// address of a dataset that `python -m meap_lit prepare text` made.
        split: Split of the dataset.
        seq_len: Tokens of a sequence that the model reads.
        num_sequences: Maximum number of sequences, from the first on; all if null.
    """

    dataset: str
    split: Literal["train", "val"] = "val"
    seq_len: int = 4096
    num_sequences: int | None = 100

    def __post_init__(self) -> None:
        for name in ("seq_len", "num_sequences"):
            check_range(f"task.{name}", getattr(self, name), "[1, inf)")

    def extent(self, model: LanguageModel) -> tuple[int, int] | None:
        self._open(model)
        return self.seq_len, self.seq_len

    def options_that_fit(self, context: int) -> dict[str, Any]:
        return {"seq_len": context}

    def items(self, model: LanguageModel) -> list[Item]:
        """Return an item for each sequence, with all of its seq_len + 1 token ids."""
        return [
            Item(f"{self.split}-{number}", {}, {"block": number}, block, num_tokens=self.seq_len)
            for number, block in enumerate(self.blocks(model))
        ]

    def blocks(self, model: LanguageModel) -> list[list[int]]:
        """Return the seq_len + 1 token ids of each sequence; the last is only a label.

        Raises:
            UserError: If dataset or split do not exist, are too short, or were made with another tokenizer.
        """
        blocks = self._open(model)
        count = len(blocks) if self.num_sequences is None else min(self.num_sequences, len(blocks))
        return [blocks[index].tolist() for index in range(count)]

    def _open(self, model: LanguageModel) -> TokenBlocks:
        manifest = Manifest.load(self.dataset)
        whose = f"that of {model.checkpoint} ({model.tokenizer.path})"
        manifest.check_tokenizer(model.tokenizer, self.dataset, whose, "--tokenizer")
        if self.split not in manifest.splits:
            raise UserError(
                f"dataset {self.dataset} has no {self.split} split, only {', '.join(manifest.splits)}; "
                f"prepare it with a val_share above 0, or choose another task.split"
            )
        files = manifest.splits[self.split].files
        blocks = TokenBlocks(f"{self.dataset.rstrip('/')}/{self.split}", self.seq_len, files=files)
        if len(blocks) == 0:
            raise UserError(
                f"the {self.split} split of dataset {self.dataset} has no chunk with task.seq_len + 1 = "
                f"{self.seq_len + 1} tokens ({manifest.splits[self.split].tokens} in all); shorten task.seq_len"
            )
        return blocks
