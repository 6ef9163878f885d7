"""Text files to a dataset of token ids that LitData streams.

Documents are tokenised by several processes and written by one, so the dataset is the same, byte for byte, whatever
their number. A document is its tokens and one end-of-text token; there is no beginning-of-text token, since the
end of the document before says as much.
"""

import hashlib
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from meap_lit.data.chunks import TokenWriter, parse_bytes
from meap_lit.data.manifest import Manifest, Source, Split
from meap_lit.data.parallel import default_num_workers, map_in_order
from meap_lit.data.preparation import Preparation
from meap_lit.data.readers import DocumentReader, find_files
from meap_lit.data.tokenizer import Tokenizer
from meap_lit.errors import UserError

_BATCH_CHARACTERS = 1 << 19  # what a worker tokenises at once: a tenth of a second


@dataclass(kw_only=True)
class PrepareText(Preparation):
    """Tokenise text files into a dataset with a train and a validation split.

    Args:
        output: Folder to make.
        input: Files, folders and glob patterns (.txt and .md, one document a file; .jsonl, .jsonl.gz, .jsonl.zst and
            .parquet, one document a line or row).
        tokenizer: Folder with a tokenizer.json.
        text_field: Name of the text in .jsonl and .parquet files.
        suffixes: File name endings to take from folders; all of the above if not given. Endings other than the above
            are read as plain text, such as .py.
        val_share: Share of documents held out for validation, chosen by a hash of their text, in [0, 1). With 0 there
            is no validation split.
        on_error: What to do at a line that cannot be read: stop, or skip it and report how many were skipped.
        chunk_bytes: Size of a chunk file.
        num_workers: Processes that tokenise; one per core, fewer for a small input, if not given.
    """

    input: list[str]
    tokenizer: str
    text_field: str = "text"
    suffixes: list[str] | None = None
    val_share: float = 0.01
    on_error: Literal["stop", "skip"] = "stop"
    chunk_bytes: str = "64MB"
    num_workers: int | None = field(default=None, compare=False)

    def make(self, folder: Path) -> str:
        started = time.perf_counter()
        chunk_bytes = self._check_options()
        tokenizer = Tokenizer.load(self.tokenizer)
        reader = DocumentReader(find_files(self.input, self.suffixes), self.text_field, self.on_error)
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
        splits = ("train", "val") if self.val_share > 0 else ("train",)
        writers = {split: TokenWriter(folder / split, dtype, chunk_bytes) for split in splits}
        total_bytes = sum(reader.sizes)
        encoded = map_in_order(
            _Encoder(tokenizer, dtype), _batches(reader), self.num_workers or default_num_workers(total_bytes)
        )
        counts = self._write(encoded, writers, total_bytes)
        self._check_splits(writers, counts)
        Manifest(
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            mask_token_id=tokenizer.mask_token_id,
            dtype=dtype.name,
            val_share=self.val_share,
            splits={name: Split(w.num_documents, w.num_tokens, w.close()) for name, w in writers.items()},
            sources=[Source(str(file), size) for file, size in zip(reader.files, reader.sizes, strict=True)],
            num_empty=counts.empty,
            num_skipped=reader.num_skipped,
        ).save(folder)
        return self._summary(writers, counts, reader.num_skipped, time.perf_counter() - started)

    def _check_options(self) -> int:
        """Size of a chunk in bytes."""
        if not 0 <= self.val_share < 1:
            raise UserError(f"val_share must be in [0, 1), got {self.val_share:g}; write 0.01 for 1%")
        if self.num_workers is not None and self.num_workers < 1:
            raise UserError(f"num_workers must be at least 1, got {self.num_workers}")
        return parse_bytes(self.chunk_bytes, "chunk_bytes")

    def _write(
        self, batches: Iterable["_EncodedBatch"], writers: dict[str, TokenWriter], total_bytes: int
    ) -> "_Counts":
        counts = _Counts()
        with _progress_bar(self.output, total_bytes) as bar:
            for batch in batches:
                ends = np.cumsum(batch.lengths)
                for start, end, draw in zip(ends - batch.lengths, ends, batch.draws, strict=True):
                    split = "val" if draw < self.val_share else "train"
                    writers[split].add(batch.tokens[start:end])
                counts.add(batch)
                bar.set_postfix_str(f"{counts.documents} documents, {counts.tokens / 1e6:.2f}M tokens", refresh=False)
                bar.update(batch.bytes_read - bar.n)
        return counts

    def _check_splits(self, writers: dict[str, TokenWriter], counts: "_Counts") -> None:
        """Every split has a document, or LitData could not open it."""
        if counts.documents == 0:
            raise UserError(
                f"no text in {', '.join(self.input)}: {counts.empty} documents are empty, none is left to write"
            )
        if writers["train"].num_documents == 0:
            raise UserError(
                f"all {counts.documents} documents fell into the validation split; lower val_share ({self.val_share:g})"
            )
        if "val" in writers and writers["val"].num_documents == 0:
            enough = (int(counts.smallest_draw * 1000) + 1) / 1000  # holds out at least the document drawn first
            remedy = f"{enough:g} or more, or to 0" if counts.documents > 1 and enough < 1 else "0"
            raise UserError(
                f"none of {counts.documents} documents fell into the validation split with val_share "
                f"{self.val_share:g}; set it to {remedy} for no validation split"
            )

    def _summary(self, writers: dict[str, TokenWriter], counts: "_Counts", num_skipped: int, seconds: float) -> str:
        splits = ", ".join(f"{name} {w.num_documents} documents {w.num_tokens} tokens" for name, w in writers.items())
        return (
            f"dataset {self.output}: {counts.documents} documents, {counts.tokens} tokens ({splits}); "
            f"{counts.empty} empty documents and {num_skipped} unreadable lines left out; "
            f"{counts.text_bytes / 1e6:.1f} MB of text in {seconds:.1f} s, {counts.text_bytes / 1e6 / seconds:.2f} MB/s"
        )


@dataclass(frozen=True)
class _Batch:
    texts: list[str]
    bytes_read: int
    """Bytes of the input files read up to here."""


@dataclass(frozen=True)
class _EncodedBatch:
    tokens: np.ndarray
    """The documents one after the other, each closed by end-of-text; empty documents left out."""
    lengths: np.ndarray
    """Tokens of each document, [N]."""
    draws: list[float]
    """A number in [0, 1) for each document that depends on its text alone."""
    num_empty: int
    text_bytes: int
    bytes_read: int


@dataclass
class _Counts:
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    text_bytes: int = 0
    smallest_draw: float = 1.0

    def add(self, batch: _EncodedBatch) -> None:
        self.documents += len(batch.lengths)
        self.tokens += len(batch.tokens)
        self.empty += batch.num_empty
        self.text_bytes += batch.text_bytes
        self.smallest_draw = min([self.smallest_draw, *batch.draws])


class _Encoder:
    """Tokenises a batch; sent to every worker."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self.tokenizer = tokenizer
        self.dtype = dtype

    def __call__(self, batch: _Batch) -> _EncodedBatch:
        texts = [text for text in batch.texts if text.strip()]
        rows, draws, text_bytes = [], [], 0
        for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
            if ids:  # a normaliser may leave nothing
                ids.append(self.tokenizer.eos_token_id)
                rows.append(ids)
                raw = text.encode()
                text_bytes += len(raw)
                draws.append(_draw(raw))
        tokens = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
        assert tokens.max(initial=0) < self.tokenizer.vocab_size, "the tokenizer gave an id outside its vocabulary"
        return _EncodedBatch(
            tokens=tokens.astype(self.dtype),
            lengths=np.array([len(ids) for ids in rows], dtype=np.int64),
            draws=draws,
            num_empty=len(batch.texts) - len(rows),
            text_bytes=text_bytes,
            bytes_read=batch.bytes_read,
        )


def _batches(reader: DocumentReader) -> Iterator[_Batch]:
    texts: list[str] = []
    size = 0
    for text in reader:
        texts.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield _Batch(texts, reader.bytes_read)
            texts, size = [], 0
    yield _Batch(texts, reader.bytes_read)


def _draw(text: bytes) -> float:
    """Equal texts get equal numbers, so that a text and its copies are never on both sides of a split."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest()) / 2**48  # 48 bits: exact in a float


def _progress_bar(output: str, total_bytes: int) -> tqdm:
    # a log file gets a line every half minute instead of ten a second
    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(total=total_bytes, desc=f"preparing {output}", unit="B", unit_scale=True, mininterval=seconds)
