"""Text files to a dataset of documents.

A document is the tokens that transformers gives its text, closed by one end-of-text token: it begins with a
beginning-of-text token if the tokenizer writes one.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from meap_lit.data.prepare.dataset import EncodedBatch, Encoder, PrepareDataset
from meap_lit.data.read.find import Input, find_input
from meap_lit.data.read.formats import Entry, InputFile
from meap_lit.data.read.readers import InputPart, TextReader
from meap_lit.data.store.writers import TokenWriter
from meap_lit.errors import UserError
from meap_lit.tokenizer.tokenizer import Tokenizer


@dataclass(kw_only=True)
class PrepareText(PrepareDataset):
    """Tokenize text files into a dataset with a train and a val split.

    Args:
        output: Folder to make.
        input: Files, folders and glob patterns, local or remote such as s3://bucket/folder (.txt and .md, one document
            a file; .jsonl, .jsonl.gz, .jsonl.zst and .parquet, one document a line or row).
        text_field: Name of the text in .jsonl and .parquet files.
        suffixes: File name endings to take from folders, such as .py, which is read as plain text; the endings listed
            under `input` if not given.
    """

    kind = "text"
    unit = "documents"
    writer = TokenWriter

    text_field: str = "text"
    suffixes: list[str] | None = None

    def new_encoder(self, tokenizer: Tokenizer) -> "TextEncoder":
        return TextEncoder(tokenizer, self.on_error)

    def find(self) -> Input:
        return find_input(self.input, self.suffixes)

    def reader(self, files: Sequence[InputFile], part: InputPart | None) -> TextReader:
        return TextReader(files, self.text_field, self.on_error, part)

    def left_out(self, counts: Counter[str]) -> str:
        return f"{counts['empty']} empty"

    def summarize(self, splits: Sequence[Any], counts: Counter[str], encoder: Any) -> Iterator[str]:
        if encoder.tokenizer.drops_unknown:
            yield "  unknown  characters outside the vocabulary are left out: the tokenizer has no token for them"


class TextEncoder(Encoder):
    """Encodes texts as documents."""

    batch_size = 1 << 19  # characters

    def size(self, entry: Entry) -> int:
        return len(entry.content)  # type: ignore[arg-type]  # a text

    def encode(self, entries: list[Entry], batch: EncodedBatch) -> None:
        not_empty = [entry for entry in entries if str(entry.content).strip()]
        texts = [str(entry.content) for entry in not_empty]
        try:
            encoded: list[list[int] | None] = [*self.tokenizer.encode_batch(texts)]
        except UserError:  # encode one by one to find the text that failed
            encoded = [self._encode_one(entry, batch) for entry in not_empty]
        unknown = self.tokenizer.unk_token_id
        for text, ids in zip(texts, encoded, strict=True):
            if ids:  # a normalizer may leave nothing
                batch.add(self.to_array(self.tokenizer.as_document(ids)), text.encode())
                batch.counts["unknown"] += 0 if unknown is None else ids.count(unknown)
        batch.counts["empty"] = len(entries) - len(batch.samples) - batch.counts["skipped"]

    def _encode_one(self, entry: Entry, batch: EncodedBatch) -> list[int] | None:
        """Return the ids of a document, or None if it cannot be encoded and is to be skipped."""
        try:
            return self.tokenizer.encode(str(entry.content))
        except UserError as error:
            self.skip(entry.where, error, batch)
            return None
