"""Text files to a dataset of token ids that LitData streams.

Documents are tokenised by several processes and written by one, so the dataset is the same, byte for byte, whatever
their number. A document is the tokens that transformers gives its text, closed by one end-of-text token: it begins with
a beginning-of-text token if the tokenizer writes one.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from meap_lit.data.prepare.splits import ShardWriter, SplitWriter, draw
from meap_lit.data.prepare.step import Preparation, progress_bar
from meap_lit.data.prepare.workers import default_num_workers, map_in_order
from meap_lit.data.read.readers import DocumentReader, InputShard, find_input
from meap_lit.data.store.chunks import Split
from meap_lit.data.store.manifest import Manifest, ShardDetails, Source
from meap_lit.data.store.writers import TokenWriter
from meap_lit.errors import UserError
from meap_lit.files import parse_bytes
from meap_lit.tokenizer.tokenizer import Tokenizer

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
        suffixes: File name endings to take from folders, such as .py, which is read as plain text; the endings listed
            under `input` if not given.
        val_share: Share of documents held out for validation, at least one, chosen by a hash of their text; in
            [0, 1). With 0 there is no validation split.
        on_error: What to do at a line that cannot be read: stop, or skip it and report how many were skipped.
        chunk_bytes: Size of a chunk file.
        shard: Part i of n to prepare, such as 3/8, i from 0 to n - 1 as SLURM_ARRAY_TASK_ID of `--array=0-7`; all parts
            together are made one dataset by `prepare merge`.
        num_workers: Processes that tokenise; one per core, fewer for a small input, if not given.
    """

    input: list[str]
    tokenizer: str
    text_field: str = "text"
    suffixes: list[str] | None = None
    val_share: float = 0.01
    on_error: Literal["stop", "skip"] = "stop"
    chunk_bytes: str = "64MB"
    shard: str | None = None
    num_workers: int | None = field(default=None, compare=False)

    def make(self, folder: Path) -> str:
        started = time.perf_counter()
        chunk_bytes = self._check_options()
        tokenizer = Tokenizer.load(self.tokenizer)
        shard = None if self.shard is None else InputShard.parse(self.shard)
        found = find_input(self.input, self.suffixes)
        reader = DocumentReader(found.files, self.text_field, self.on_error, shard)
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
        writer = SplitWriter if shard is None else ShardWriter
        splits = writer(TokenWriter, folder, dtype, chunk_bytes, self.val_share)
        encoded = map_in_order(
            _Encoder(tokenizer, dtype), _batches(reader), self.num_workers or default_num_workers(reader.num_bytes)
        )
        counts = _Counts()
        with closing(encoded), progress_bar(f"preparing {self.output}", reader.num_bytes) as bar:
            for batch in encoded:
                for document in batch.documents():
                    splits.add(*document)
                counts.add(batch)
                bar.set_postfix_str(f"{counts.documents} documents, {counts.tokens / 1e6:.2f}M tokens", refresh=False)
                bar.update(batch.bytes_read - bar.n)
        if counts.documents == 0 and shard is None:
            left_out = [f"{counts.empty} empty documents", *([reader.skipped] if reader.num_skipped else [])]
            raise UserError(f"no text to tokenise in {', '.join(self.input)} ({', '.join(left_out)})")
        sizes = splits.close()
        assert sum(split.tokens for split in sizes.values()) == counts.tokens, "documents were lost on the way"
        Manifest(
            tokenizer_fingerprint=tokenizer.document_fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            mask_token_id=tokenizer.mask_token_id,
            dtype=dtype.name,
            val_share=self.val_share,
            splits=sizes,
            sources=[Source(str(file), size) for file, size in zip(reader.files, reader.sizes, strict=True)],
            num_empty=counts.empty,
            num_skipped=reader.num_skipped,
            shard=None if shard is None else ShardDetails(shard.index, shard.count, splits.reserve_draw),
        ).save(folder)
        left_out = [f"  left out {counts.empty} empty documents, {reader.skipped}", *found.lines_of_summary()]
        if tokenizer.drops_unknown:
            left_out.append(
                "  unknown  characters outside the vocabulary are left out: the tokenizer has no token for them"
            )
        return self._summary(sizes, counts, left_out, time.perf_counter() - started)

    def _check_options(self) -> int:
        """Size of a chunk in bytes."""
        if self.num_workers is not None and self.num_workers < 1:
            raise UserError(f"num_workers must be at least 1, got {self.num_workers}")
        return parse_bytes(self.chunk_bytes, "chunk_bytes")

    def _summary(self, sizes: dict[str, Split], counts: "_Counts", left_out: list[str], seconds: float) -> str:
        megabytes = counts.text_bytes / 1e6
        unknown = f"  unknown  {counts.unknown} tokens ({counts.unknown / max(1, counts.tokens):.2%}) of text outside"
        return "\n".join(
            [
                f"dataset {self.output}" + ("" if self.shard is None else f", shard {self.shard} for prepare merge"),
                *(f"  {name:<9}{size.documents} documents, {size.tokens} tokens" for name, size in sizes.items()),
                f"  in all   {counts.documents} documents, {counts.tokens} tokens, end-of-text tokens included",
                *([f"{unknown} the vocabulary"] if counts.unknown else []),
                *left_out,
                f"  took     {seconds:.1f} s for {megabytes:.1f} MB of text, {megabytes / seconds:.2f} MB/s",
            ]
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
    num_unknown: int
    """Tokens that stand for text outside the vocabulary."""
    text_bytes: int
    bytes_read: int

    def documents(self) -> Iterator[tuple[np.ndarray, float]]:
        """Tokens and draw of each document."""
        ends = np.cumsum(self.lengths)
        for start, end, number in zip(ends - self.lengths, ends, self.draws, strict=True):
            yield self.tokens[start:end], number


@dataclass
class _Counts:
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    unknown: int = 0
    text_bytes: int = 0

    def add(self, batch: _EncodedBatch) -> None:
        self.documents += len(batch.lengths)
        self.tokens += len(batch.tokens)
        self.empty += batch.num_empty
        self.unknown += batch.num_unknown
        self.text_bytes += batch.text_bytes


class _Encoder:
    """Tokenises a batch; sent to every worker."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self.tokenizer = tokenizer
        self.dtype = dtype

    def __call__(self, batch: _Batch) -> _EncodedBatch:
        texts = [text for text in batch.texts if text.strip()]
        rows, draws, text_bytes, num_unknown = [], [], 0, 0
        unknown = self.tokenizer.unk_token_id
        for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
            if ids:  # a normaliser may leave nothing
                num_unknown += ids.count(unknown) if unknown is not None else 0
                rows.append(self.tokenizer.as_document(ids))
                raw = text.encode()
                text_bytes += len(raw)
                draws.append(draw(raw))
        tokens = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
        assert tokens.max(initial=0) < self.tokenizer.vocab_size, "the tokenizer gave an id outside its vocabulary"
        return _EncodedBatch(
            tokens=tokens.astype(self.dtype),
            lengths=np.array([len(ids) for ids in rows], dtype=np.int64),
            draws=draws,
            num_empty=len(batch.texts) - len(rows),
            num_unknown=num_unknown,
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
